"""How good is the tokenizer: figures and pictures."""
