"""The app: upload images, train LoRA and Flat-LoRA, and compare them in the browser."""
