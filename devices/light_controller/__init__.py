"""Light controllers: 13-byte schedule messages as hexadecimal text over MQTT."""
