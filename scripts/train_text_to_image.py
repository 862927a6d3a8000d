"""Fine-tune Stable Diffusion, with the flags of diffusers' script."""

from limner.compat.diffusers import main

if __name__ == "__main__":
    raise SystemExit(main("train_text_to_image"))
