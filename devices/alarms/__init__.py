"""Alarm rules as pure functions: no Kafka, no Faust, no clock of their own.

``rules`` reads and checks them, ``prepare`` compiles one, ``evaluate`` is the state machine, ``index`` finds the
rules of a reading, ``engine`` keeps the states of one partition, ``replay`` runs history through it. docs/alarms.md
says what it all means to the person who writes a rule.
"""
