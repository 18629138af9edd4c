"""What `train_gm_sgm.py` is made of."""
