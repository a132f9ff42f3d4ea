"""SenML (RFC 8428) in JSON and CBOR."""
