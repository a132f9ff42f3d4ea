"""Efento NB-IoT sensors: protobuf over CoAP."""
