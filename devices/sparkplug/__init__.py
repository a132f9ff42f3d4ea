"""Sparkplug B: industrial edge nodes and their devices over MQTT."""
