"""From text to a trained model: corpus, tokenizer, token files, training."""
