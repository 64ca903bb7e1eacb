"""A tokenizer without a file: one printable character an id."""


class ToyTokenizer:
    bos_id, eos_id, unk_id = 1, 2, 0

    def __init__(self, vocab_size=61):
        self.vocab_size = vocab_size

    def encode(self, text):
        return [3 + ord(c) % (self.vocab_size - 3) for c in text]

    def decode(self, ids):
        return "".join(chr(ord("A") + one - 3) for one in ids if one > 2)
