"""HunyuanVideo (arXiv 2412.03603): text to video, text last."""
