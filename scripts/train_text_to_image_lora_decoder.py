"""Fine-tune the decoder of Kandinsky 2.2 with LoRA, with the flags of diffusers' script of this
name."""

from limner.compat.diffusers import main

if __name__ == "__main__":
    raise SystemExit(main("train_text_to_image_lora_decoder"))
