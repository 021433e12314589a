"""Binary masks of objects: from polygons, from prototypes, their overlap and how they are written down."""
