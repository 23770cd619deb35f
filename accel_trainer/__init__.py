"""Fine-tune BERT-family encoders for text classification."""
