-- Reference rows. Codes of LOINC and ISO/IEEE 11073-10101 (MDC) only where one exists for the signal as a whole.

INSERT INTO device_types (code, description) VALUES
    ('eeg_headset', 'EEG headset or amplifier'),
    ('pulse_oximeter', 'Pulse oximeter'),
    ('bp_monitor', 'Blood pressure monitor'),
    ('thermometer', 'Body thermometer'),
    ('hr_strap', 'Heart rate strap'),
    ('gps', 'Position receiver');

INSERT INTO signal_types (code, unit, loinc, mdc) VALUES
    ('vital_signs', NULL, NULL, NULL),
    ('brain_state', '1', NULL, NULL),
    ('eeg', 'uV', NULL, NULL),
    ('ecg', 'mV', NULL, '131328'),   -- MDC_ECG_ELEC_POTL
    ('ppg', NULL, NULL, '150452');   -- MDC_PULS_OXIM_PLETH
