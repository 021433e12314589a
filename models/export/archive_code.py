"""The code of a TorchScript archive, read word by word: anything but the operators of an exported network is refused.

TorchScript has operators that write and map files (``aten::save``, ``aten::from_file``), and runs ``__setstate__`` while it loads. So each
call has to be an operator of a list, a ``forward`` of a module in the archive, or a conversion. What a trace writes needs a small part of
the language; only that part is accepted, so that torch's own reader of the same text cannot see another program in it: no comments, no
escapes in strings, no control flow, no functions but ``forward``, no assignment to the name of a function.
"""

from __future__ import annotations

import re

from utils.errors import UserError

DEEPEST, MOST_LOOKUPS = 200, 2000  # brackets inside one another, attributes and indices in one statement: torch reads them by recursion
LONGEST_WORD = 60  # characters that a message quotes
_TOKEN = re.compile(
    r"""[ ]*(?:(?P<line>\n)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<number>[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)"""
    r"""|(?P<text>"[^"\\\n]*"(?!"))|(?P<sign>[()\[\],.:=>-]))"""
)
_FORWARD, _CONSTANT = re.compile(r"forward[0-9]*"), re.compile(r"CONSTANTS\.c[0-9]+")
_ROOTS = frozenset(("torch", "ops", "CONSTANTS", "__torch__"))  # where dotted names begin that are no variables
_FUNCTIONS = frozenset(("annotate", "getattr", "int", "float", "bool"))
_OTHER = """
    and as assert async await break continue del elif else except finally for from global if import in is lambda nonlocal not or pass raise
    try while with yield
"""
_OTHER_WORDS = frozenset(_OTHER.split())  # of the language
_OPERATORS = """
    Bool BoolImplicit Float FloatImplicit Int IntImplicit ScalarImplicit __and__ __not__ __or__ __xor__ _convolution _convolution_mode
    _softmax abs abs_ acos adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d add add_ addbmm addcdiv addcmul
    addmm addmv affine_grid_generator alias all amax amin aminmax any arange argmax argmin argsort as_tensor asin atan atan2 avg_pool1d
    avg_pool2d baddbmm batch_norm bitwise_and bitwise_not bitwise_or bmm broadcast_tensors broadcast_to bucketize cat ceil celu
    channel_shuffle chunk clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clip clone col2im concat constant_pad_nd contiguous
    conv1d conv2d conv_transpose1d conv_transpose2d copy_ cos cosh cosine_similarity cross cumprod cumsum deg2rad detach device diag
    diag_embed diagonal diff dim div div_ dot dropout dropout_ einsum elu elu_ embedding empty empty_like eq erf exp exp_ expand expand_as
    expm1 eye feature_dropout fill_ flatten flip floor floor_ floor_divide fmod frobenius_norm full full_like gather ge gelu glu
    grid_sampler grid_sampler_2d group_norm gt hardshrink hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ im2col index
    index_add index_copy index_fill index_put index_put_ index_select instance_norm is_floating_point isfinite isinf isnan item kthvalue
    l1_loss layer_norm le leaky_relu leaky_relu_ len lerp lift_fresh linalg_norm linalg_vector_norm linear linspace log log10 log1p log2
    log_sigmoid log_softmax logaddexp logical_and logical_not logical_or logical_xor logit logsumexp lt masked_fill masked_fill_
    masked_scatter masked_select matmul max max_pool1d max_pool2d max_pool2d_with_indices maximum mean median meshgrid min minimum mish
    mish_ mm moveaxis movedim mul mul_ multiply mv nan_to_num narrow native_layer_norm ne neg neg_ new_empty new_full new_ones new_zeros
    nonzero norm normal numel one_hot ones ones_like outer pad permute pixel_shuffle pixel_unshuffle pow pow_ prelu prod ravel reciprocal
    reflection_pad1d reflection_pad2d relu relu6 relu6_ relu_ remainder repeat repeat_interleave replication_pad1d replication_pad2d
    reshape reshape_as rms_norm roll rot90 round rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_ scatter_add select
    selu selu_ sigmoid sigmoid_ sign silu silu_ sin sinh size slice softmax softplus softshrink softsign sort split split_with_sizes sqrt
    square squeeze stack std std_mean sub sub_ subtract sum swapaxes swapdims t take_along_dim tan tanh tanh_ tensor tensor_split
    threshold threshold_ tile to topk transpose tril triu true_divide trunc type_as unbind unflatten unfold unsafe_chunk unsafe_split
    unsqueeze unsqueeze_ upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest_exact2d var var_mean view view_as where zero_ zeros zeros_like
"""
OPERATORS = frozenset((
    *(f"torch.{name}" for name in _OPERATORS.split()),
    *(f"ops.prim.{name}" for name in ("NumToTensor", "device", "dtype", "is_cuda", "max", "min", "unchecked_unwrap_optional")),
    *(f"ops.torchvision.{name}" for name in ("deform_conv2d", "nms", "roi_align")),
))  # fmt: skip


def check_code(text: str, *, where: str) -> None:
    """Reads one file of code.

    Raises:
        UserError: the first thing in it that an exported network does not need; ``where`` begins the message.
    """
    reader = _Reader(where)
    end = 0
    for match in _TOKEN.finditer(text):
        if match.start() != end:
            break
        end, kind = match.end(), str(match.lastgroup)
        reader.take(kind, match[kind])
    if rest := text[end:].lstrip(" "):
        raise reader.refusal(ascii(rest[0]))
    if reader.open:
        raise reader.refusal("an unmatched bracket")
    reader.take("line", "\n")


class _Reader:
    """What has been seen of the statement so far."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.open: list[str] = []  # brackets
        self._start_statement()

    def _start_statement(self) -> None:
        self.before, self.last, self.kind = "", "", "line"  # the two words before this one, and what the last one is
        self.dotted: list[str] = []  # a name and the attributes behind it, as far as it has been read
        self.names: set[str] = set()
        self.in_class_line = False
        self.lookups = 0

    def take(self, kind: str, word: str) -> None:
        """The next word."""
        if kind == "line" and self.open:
            return  # inside brackets it separates nothing
        if self.kind == "name" and word != ".":
            self._end_name(called=word == "(")
        if word in ("class", "def", "return"):
            kind = "keyword"
            self.in_class_line |= word == "class"
        elif kind == "name":
            self._take_name(word)
        elif kind == "sign":
            self._take_sign(word)
        if kind == "line":
            self._start_statement()
        else:
            self.before, self.last, self.kind = self.last, word, kind

    def _take_name(self, name: str) -> None:
        if name in _OTHER_WORDS:
            raise self.refusal(name)
        if self.last == "def" and not _FORWARD.fullmatch(name):
            raise self.refusal(f"def {name}")
        if self.in_class_line and self.open and name != "Module":
            raise self.refusal(f"a class of the kind {name}")
        if self.last == ".":
            self.dotted.append(name)
        else:
            self.dotted = [name]
            self.names.add(name)

    def _end_name(self, *, called: bool) -> None:
        """Checks a dotted name once it is complete."""
        word, first = ".".join(self.dotted), self.dotted[0]
        if first in _ROOTS:
            is_class = first == "__torch__" and not called and not word.startswith("__torch__.torch.classes")
            if not (is_class or word in OPERATORS or _CONSTANT.fullmatch(word)):
                raise self.refusal(word)
        elif called and self.before not in ("class", "def"):
            is_forward = len(self.dotted) > 1 and _FORWARD.fullmatch(self.dotted[-1])
            if not is_forward and word not in _FUNCTIONS:
                raise self.refusal(f"{word.lstrip('.')}()")

    def _take_sign(self, sign: str) -> None:
        if sign in "([":
            if sign == "(" and (self.kind in ("text", "number") or self.last in (")", "]")):
                raise self.refusal("a call of a result")
            self.lookups += sign == "[" and (self.kind == "name" or self.last in (")", "]"))
            self.open.append(sign)
        elif sign in ")]":
            if not self.open or self.open.pop() != {")": "(", "]": "["}[sign]:
                raise self.refusal(f"an unmatched {sign}")
        elif sign == ".":
            self.lookups += 1
            if self.kind != "name":
                self.dotted = [""]  # an attribute of a result
        elif sign == "=" and not self.open and self.names & (_ROOTS | _FUNCTIONS):
            raise self.refusal(f"an assignment to {min(self.names & (_ROOTS | _FUNCTIONS))}")
        if sign == self.last == "-" or len(self.open) > DEEPEST or self.lookups > MOST_LOOKUPS:
            raise self.refusal("an expression nested too deep")

    def refusal(self, what: str) -> UserError:
        shown = what if len(what) <= LONGEST_WORD else what[:LONGEST_WORD] + "…"
        return UserError(f"{self.where} holds {shown}, which no exported network needs")
