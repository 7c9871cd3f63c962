"""SiDP for SGLang: the data-parallel ranks keep one copy of the pooled weights between them."""

__version__ = "0.1.0"
