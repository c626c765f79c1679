"""What torch itself counts."""


def live_peak_bytes(step):
    """The most bytes that live at once in a call beyond what lived before, by torch's own count."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):  # the first use of an operator may keep something
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
