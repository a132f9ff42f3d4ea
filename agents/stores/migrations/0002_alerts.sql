-- The life of each alert: one row with its present state, and every transition that led there.
CREATE TABLE IF NOT EXISTS alerts (
    id                   text COLLATE "C" PRIMARY KEY,
    alarm_id             text        NOT NULL,
    name                 text        NOT NULL,
    message              text        NOT NULL,
    level                text        NOT NULL,
    alarm_type           text        NOT NULL,
    device_id            text COLLATE "C" NOT NULL,
    sensor_name          text        NOT NULL,
    field_name           text        NOT NULL,
    error_value          text,
    threshold            text,
    math_operator        text        NOT NULL,
    start_date           timestamptz NOT NULL,
    end_date             timestamptz,
    is_resolved          boolean     NOT NULL,
    recipients           text        NOT NULL,
    request_id           text        NOT NULL,
    metadata             jsonb       NOT NULL DEFAULT '{}',
    acknowledged_at      timestamptz,
    acknowledged_by      text,
    acknowledged_comment text,
    updated_at           timestamptz NOT NULL
);
CREATE INDEX IF NOT EXISTS alerts_start_date ON alerts (start_date DESC);
CREATE INDEX IF NOT EXISTS alerts_device ON alerts (device_id, start_date DESC);
CREATE INDEX IF NOT EXISTS alerts_open ON alerts (start_date DESC) WHERE NOT is_resolved;

-- kind: OPEN, RESOLVED, ACKNOWLEDGED. body: the message as it was.
CREATE TABLE IF NOT EXISTS alert_events (
    alert_id  text COLLATE "C" NOT NULL,
    kind      text COLLATE "C" NOT NULL,
    time      timestamptz      NOT NULL,
    device_id text             NOT NULL,
    actor     text,
    comment   text,
    body      jsonb            NOT NULL,
    PRIMARY KEY (alert_id, kind, time)
);
