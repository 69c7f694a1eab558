"""Language models: fields, documents, blocks, stream, tokenizer, the task."""
