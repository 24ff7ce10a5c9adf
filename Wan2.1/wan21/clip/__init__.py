"""The CLIP image encoder."""
