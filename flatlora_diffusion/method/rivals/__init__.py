"""The methods that Flat-LoRA is compared with: SAM over W or over A and B, BAR and Bi-LoRA.

Knows nothing of Flat-LoRA's noise. Start with `sam.py`.
"""
