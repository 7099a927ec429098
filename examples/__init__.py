"""Three complete trainings outside of images with the paper's settings, one file each.

Beside them `space/`, the app as a Hugging Face Space, and `peft_image_gen/`, an entry for PEFT's benchmark of images.
"""
