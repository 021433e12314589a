"""RT-DETR's head: the best cells of all maps become object queries, which a transformer decoder refines to boxes without suppression.

DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from models.assigners.denoising import QUERIES, DenoisingTargets, denoising_targets, group_count, noisy_objects, visibility
from models.heads.base import Deployed, Head, HeadOutput, Loss, ParameterPart
from models.layers.conv import FusedConv, fuse_conv_bn
from models.layers.query_decoder import MLP, DecoderSizes, QueryDecoder, full, logit
from models.losses.set_prediction import DENOISING, SetPredictionLoss
from models.spec import channel_rules as rules
from models.spec.registry import register
from utils.boxes import cxcywh_to_xyxy
from utils.errors import UserError
from utils.types import Batch, Predictions

if TYPE_CHECKING:
    from utils.config import Hyperparameters

SIDE = 0.05  # of a cell's first box on the finest map, in 0-1; twice as much on the next
BORDER = 0.01  # cells whose first box comes nearer to 0 or 1 are no candidates
PRIOR = 0.01  # score of a new network
WH_PX = "wh_px"  # name among the shared outputs: sides of the network's input
CLASSES = {"class": slice(0, None)}


class Chosen(NamedTuple):
    """The queries that the decoder starts from."""

    content: Tensor  # (B, Q, C)
    box_logits: Tensor  # (B, Q, 4) of cxcywh in 0-1
    scores: Tensor  # (B, Q, nc) logits


@register("RTDETRDecoder", channels=rules.head, kind="head")
class RTDETRDecoder(Head):
    """Rows are ``[nc]`` or, as published, ``[nc, hd, nq, ndp, nh, ndl, d_ffn]``.

    ``branches`` holds one map a stage, (B, Q, 4 + nc): box cxcywh in 0-1, then class logits; in training of the chosen cells and of every
    decoder layer, otherwise of the last layer alone. ``shared`` has the sides of the image, and in training ``denoising``
    (B, layers, D, 4 + nc). The queries keep the order of their cells, so that small changes of scores do not exchange them.

    Args:
        nc: number of classes.
        channels: width of each input.
        hd: width of the decoder.
        nq: number of queries; fewer where there are fewer cells.
        ndp: points that a head samples in each map.
        nh: heads.
        ndl: decoder layers.
        d_ffn: hidden width of the feed-forward layers.
        dropout: within the layers.

    Raises:
        UserError: a size that is not positive, or a width that does not divide by the heads.
    """

    one_to_one = True
    never_suppressed = "RT-DETR has no branch for suppression"

    def __init__(
        self, nc: int, channels: Sequence[int], hd: int = 256, nq: int = 300, ndp: int = 4, nh: int = 8, ndl: int = 6, d_ffn: int = 1024,
        *, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_sizes({"nc": nc, "hd": hd, "nq": nq, "ndp": ndp, "nh": nh, "ndl": ndl, "d_ffn": d_ffn})
        if hd % nh:
            raise UserError(f"hd {hd}: does not divide by the {nh} heads (nh)")
        self.nc, self.nq = nc, nq
        self.strides = ()
        self.input_proj = nn.ModuleList(Projection(c, hd) for c in channels)
        self.decoder = QueryDecoder(DecoderSizes(hd, nh, len(channels), ndp, d_ffn, dropout), ndl)
        self.denoising_class_embed = nn.Embedding(nc, hd)
        self.query_pos_head = MLP(4, 2 * hd, hd, 2)
        self.enc_output = nn.Sequential(nn.Linear(hd, hd), nn.LayerNorm(hd))
        self.enc_score_head = nn.Linear(hd, nc)
        self.enc_bbox_head = MLP(hd, hd, 4, 3)
        self.dec_score_head = nn.ModuleList(nn.Linear(hd, nc) for _ in range(ndl))
        self.dec_bbox_head = nn.ModuleList(MLP(hd, hd, 4, 3) for _ in range(ndl))
        self._initialise()

    @staticmethod
    def row_arguments(args: Sequence[Any]) -> tuple[None, Sequence[Any]]:
        """What follows nc in a row are sizes, never anchors."""
        return None, args

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        plain = ("decoder", "query_pos_head", "enc_output", "enc_bbox_head", "dec_bbox_head")
        scored = ("enc_score_head", "dec_score_head", "denoising_class_embed")
        return {
            "input_proj": ParameterPart("projection"),
            **{name: ParameterPart(name, by_level=False) for name in plain},
            **{name: ParameterPart(name, by_level=False, output="*", channels=CLASSES) for name in scored},
        }

    def targets_of(self, batch: Batch) -> DenoisingTargets:
        return denoising_targets(batch)

    def forward(self, features: Sequence[Tensor], targets: DenoisingTargets | None = None) -> HeadOutput:
        """Maps (B, C_i, H_i, W_i), and in training the batch's objects, to boxes and class logits of the queries."""
        maps = [projection(x) for projection, x in zip(self.input_proj, features)]  # (B, C, H_i, W_i)
        chosen = self._choose(maps)
        shared = {WH_PX: self._sides_px(features[0])}
        if not self.training:
            return HeadOutput(((self._decode_layers(chosen, maps)[-1],),), shared)
        start = chosen._replace(content=chosen.content.detach(), box_logits=chosen.box_logits.detach())
        sees, denoising = None, 0
        if targets is not None:
            start, sees, denoising = self._with_denoising(start, targets)
        layers = self._decode_layers(start, maps, sees)
        first = torch.cat((full(chosen.box_logits).sigmoid(), full(chosen.scores)), dim=-1)
        if denoising:
            shared[DENOISING] = torch.stack([layer[:, :denoising] for layer in layers], dim=1)
        return HeadOutput(((first,), *((layer[:, denoising:],) for layer in layers)), shared)

    def decode(self, output: HeadOutput) -> Predictions:
        """Boxes (B, Q, 4) xyxy px and scores (B, Q, nc) of the last layer, which need no suppression."""
        boxes, logits = output.main[0].split((4, self.nc), dim=-1)
        whwh = output.shared[WH_PX].repeat(1, 2)[:, None]
        return Predictions(cxcywh_to_xyxy(boxes) * whwh, logits.sigmoid(), unique=True)

    def build_loss(self, hyp: Hyperparameters) -> Loss:
        return SetPredictionLoss(hyp, nc=self.nc)

    def deploy(self) -> Deployed:
        """This head: outside training only the last layer's queries are scored."""
        return Deployed(self, list(range(len(self.input_proj))))

    def set_strides(self, strides: Sequence[float]) -> None:
        self.strides = tuple(float(s) for s in strides)

    def _choose(self, maps: Sequence[Tensor]) -> Chosen:
        """The cells of the highest class score, in the order of the cells."""
        cells = torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)  # (B, N, C)
        first_boxes, valid = first_box_logits(maps)  # (1, N, 4), (1, N, 1)
        cells = self.enc_output(valid.to(cells.dtype) * cells)
        scores = self.enc_score_head(cells)
        best = scores.amax(dim=-1).topk(self._count(scores), dim=1).indices.sort(dim=1).values[..., None]  # (B, Q, 1)
        content = cells.gather(1, best.expand(-1, -1, cells.shape[2]))
        placed = first_boxes.expand(cells.shape[0], -1, -1).gather(1, best.expand(-1, -1, 4))
        return Chosen(content, full(self.enc_bbox_head(content)) + placed, scores.gather(1, best.expand(-1, -1, self.nc)))

    def _count(self, scores: Tensor) -> Any:
        """Number of queries; a tensor while a graph is recorded, in which the image's size is free."""
        if torch.jit.is_tracing():
            cells = torch._shape_as_tensor(scores)[1]
            return torch.minimum(cells, torch.full_like(cells, self.nq))
        return min(self.nq, scores.shape[1])

    def _with_denoising(self, start: Chosen, targets: DenoisingTargets) -> tuple[Chosen, Tensor, int]:
        """Denoising queries before the chosen ones, which query sees which, and the number of denoising queries."""
        noisy = noisy_objects(targets, nc=self.nc, queries=QUERIES)
        count = noisy.labels.shape[1]
        content = torch.cat((self.denoising_class_embed(noisy.labels).to(start.content.dtype), start.content), dim=1)
        boxes = torch.cat((logit(noisy.boxes).to(start.box_logits.dtype), start.box_logits), dim=1)
        groups = group_count(targets.labels.shape[1], QUERIES)
        return start._replace(content=content, box_logits=boxes), visibility(count, groups, start.content.shape[1], content.device), count

    def _decode_layers(self, start: Chosen, maps: Sequence[Tensor], sees: Tensor | None = None) -> list[Tensor]:
        """(B, Q, 4 + nc) after each layer; outside training after the last one only.

        A layer starts from the boxes before it without their gradient, and the loss of what it adds goes to the layer before, too
        (DINO, arXiv 2203.03605, section 3.5).
        """
        queries, boxes = start.content, start.box_logits.sigmoid()
        before, out = boxes, []
        for layer, box_head, score_head in zip(self.decoder.layers, self.dec_bbox_head, self.dec_score_head):
            queries = layer(queries, self.query_pos_head(boxes.to(queries.dtype)), boxes, maps, sees)
            change = full(box_head(queries))
            refined = (change + logit(boxes)).sigmoid()
            if self.training:
                out.append(torch.cat(((change + logit(before)).sigmoid(), full(score_head(queries))), dim=-1))
            before, boxes = refined, refined.detach() if self.training else refined
        return out or [torch.cat((boxes, full(self.dec_score_head[-1](queries))), dim=-1)]

    def _sides_px(self, finest: Tensor) -> Tensor:
        """(B, 2) float32, width and height of the network's input in px."""
        stride = self.strides[0] if self.strides else 1.0
        width_height = (finest.shape[3], finest.shape[2])
        sides = torch.cat([torch.full((1, 1), n * stride, dtype=torch.float32, device=finest.device) for n in width_height], dim=1)
        return sides.expand(finest.shape[0], 2)

    @torch.no_grad()
    def _initialise(self) -> None:
        bias = -math.log((1 - PRIOR) / PRIOR)
        for scores in (self.enc_score_head, *self.dec_score_head):
            scores.bias.fill_(bias)
        for boxes in (self.enc_bbox_head, *self.dec_bbox_head):
            boxes.layers[-1].weight.zero_()
            boxes.layers[-1].bias.zero_()
        for layer in (self.enc_output[0], *self.query_pos_head.layers):
            nn.init.xavier_uniform_(layer.weight)


class Projection(nn.Sequential):
    """A pointwise convolution and batch norm under their published names, ``0`` and ``1``."""

    def __init__(self, c1: int, c2: int) -> None:
        conv = nn.Conv2d(c1, c2, 1, bias=False)
        nn.init.xavier_uniform_(conv.weight)
        super().__init__(conv, nn.BatchNorm2d(c2))

    def fused(self) -> FusedConv:
        """The same function in eval mode as one convolution with a bias."""
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        return FusedConv(fuse_conv_bn(conv, norm), nn.Identity()).train(self.training)


def first_box_logits(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (1, N, 4) of the boxes around the cells' centres, cxcywh in 0-1, and (1, N, 1) bool, which lie inside; infinite elsewhere."""
    boxes = []
    for level, x in enumerate(maps):
        height, width = x.shape[-2:]
        across = (torch.arange(width, device=x.device, dtype=torch.float32) + 0.5) / width
        down = (torch.arange(height, device=x.device, dtype=torch.float32) + 0.5) / height
        centres = torch.stack((across.expand(height, width), down[:, None].expand(height, width)), dim=-1)
        boxes.append(torch.cat((centres, torch.full_like(centres, SIDE * 2**level)), dim=-1).flatten(0, 1))
    joined = torch.cat(boxes)[None]
    inside = ((joined > BORDER) & (joined < 1 - BORDER)).all(dim=-1, keepdim=True)
    return torch.log(joined / (1 - joined)).masked_fill(~inside, torch.inf), inside


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{name} {size!r}: expected a positive whole number")
