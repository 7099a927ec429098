"""Three complete trainings outside of images, with the paper's settings: one file each, no more than what it needs."""
