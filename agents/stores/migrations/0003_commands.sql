-- The life of each command. A status can be stored before its command, which is on another topic: what only the command
-- knows is empty until it comes, and updated_at is the time of the status that gave the present state.
CREATE TABLE IF NOT EXISTS commands (
    request_id   text COLLATE "C" PRIMARY KEY,
    device_id    text COLLATE "C" NOT NULL,
    command_type text,
    payload      jsonb,
    protocol     text,
    metadata     jsonb,
    priority     bigint,
    expires_at   timestamptz,
    state        text        NOT NULL,
    detail       text        NOT NULL DEFAULT '',
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz
);
CREATE INDEX IF NOT EXISTS commands_device ON commands (device_id, created_at DESC);

CREATE TABLE IF NOT EXISTS command_events (
    request_id text COLLATE "C" NOT NULL,
    state      text COLLATE "C" NOT NULL,
    time       timestamptz      NOT NULL,
    detail     text             NOT NULL,
    PRIMARY KEY (request_id, state, time)
);
