"""The engine of the chunked memories: a bank of memories learns a chunk of tokens."""
