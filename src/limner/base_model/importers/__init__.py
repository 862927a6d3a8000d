"""Foreign layouts, written once as the diffusers folder that they are."""
