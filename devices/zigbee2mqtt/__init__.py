"""Zigbee2MQTT: Zigbee devices as JSON."""
