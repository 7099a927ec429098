"""What Flat-LoRA is compared with: SAM over W or over A and B, balance of A and B, and Bi-LoRA.

Knows nothing of noise. Start with `sam.py`.
"""
