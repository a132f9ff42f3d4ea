-- Readings, one row for each value of a sample. The key is what makes a redelivered reading change nothing.
--
-- COLLATE "C": keys are identifiers, compared byte by byte. That is several times faster than a language's rules, and an
-- index over it survives an update of the operating system's locale data.
-- Tables are taken as they are where somebody has made them beforehand (partitioned in their own way, for instance).
CREATE TABLE IF NOT EXISTS readings (
    device_id  text COLLATE "C" NOT NULL,
    index      text COLLATE "C" NOT NULL,
    label      text COLLATE "C" NOT NULL,
    time       timestamptz      NOT NULL,
    value      double precision,
    value_text text,
    unit       text,
    request_id text,
    PRIMARY KEY (device_id, index, label, time)
);

-- Rows arrive nearly in order of time, so that a block range index finds a window at almost no cost for the writer.
CREATE INDEX IF NOT EXISTS readings_time ON readings USING brin (time);
