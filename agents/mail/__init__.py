"""From an alert to an inbox or a webhook; agents/mailer.py drives it. docs/mail.md says what people get and when."""
