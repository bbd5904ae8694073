"""A run's report: one HTML file that stands alone, with curves, ledger, time, alarms and a browser of samples.

    metrics.jsonl ─ curves ─┐
    summary.json ─ heads ───┼─ page ─ RUN/report.html
    samples/*.gz ─ sample_files ─ sample_store ─┘        (marks: what stands out in a text)

The page (assets/) asks no network for anything; its content security policy forbids it.
"""
