"""Sources of pictures and captions, and the order and crops in which training sees them."""
