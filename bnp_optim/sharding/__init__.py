"""Models whose weights are sharded (``DTensor``): FSDP2, tensor parallel, meshes of both."""
