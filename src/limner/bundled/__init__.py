"""What comes with Limner: the small base model and the captioned pictures of the demo."""
