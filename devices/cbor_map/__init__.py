"""CBOR maps: plain JSON's fields in the binary format of constrained devices."""
