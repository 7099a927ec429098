"""SDXL: loading, inputs, objective, drawings for other tools. Start with `pipeline.py` (`Sdxl`)."""
