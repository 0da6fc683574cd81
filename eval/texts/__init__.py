"""What the models read: documents, samples, and the windows that they are cut into."""
