-- Signals beside EEG that headsets and sensors give. UCUM units; no LOINC or MDC code exists for them.
INSERT INTO signal_types (code, unit) VALUES
    ('acceleration', '[g]'),
    ('gyro', 'deg/s'),
    ('optics', '1'),
    ('aux', '1');

-- Points of raw signals carry microvolts, ECG as well as EEG.
UPDATE signal_types SET unit = 'uV' WHERE code = 'ecg';
