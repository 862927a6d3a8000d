"""Fine-tune the whole network of a Stable Diffusion, with the flags of diffusers' script of this
name."""

from limner.compat.diffusers import main

if __name__ == "__main__":
    raise SystemExit(main("train_text_to_image"))
