"""The study's verdicts: from the records of its cells, without torch but for what is measured inside them."""
