//! The steps of a connection's life, by a clock of the test's own.

use super::*;

const MILLISECOND: Duration = Duration::from_millis(1);

fn pause_of(supervisor: &mut Supervisor<()>, now: Instant) -> Duration {
    match supervisor.next_step(now) {
        Step::WaitUntil(time, None) => time - now,
        step => panic!("{step:?}"),
    }
}

/// Disconnected after a pause of at least this long.
fn disconnected(now: Instant, shortest: Duration) -> Supervisor<()> {
    let mut supervisor = Supervisor::new(now);
    loop {
        supervisor.disconnected(now);
        if pause_of(&mut supervisor, now) >= shortest {
            return supervisor;
        }
    }
}

#[test]
fn the_first_step_is_to_connect() {
    let now = Instant::now();
    let mut supervisor = Supervisor::<()>::new(now);
    assert_eq!(supervisor.next_step(now), Step::Connect);
    supervisor.connected((), now);
    assert_eq!(supervisor.next_step(now), Step::WaitUntil(now + PROBE_INTERVAL, Some(&mut ())));
}

#[test]
fn pauses_double_up_to_two_seconds_and_vary() {
    let now = Instant::now();
    let mut last_pauses = Vec::new();
    for _ in 0..100 {
        let mut supervisor = Supervisor::new(now);
        for doubled in 0..12 {
            supervisor.disconnected(now);
            let pause = pause_of(&mut supervisor, now);
            let longest = MAX_PAUSE.min(Duration::from_millis(50) * (1 << doubled));
            // Rounded, because the back-off calculates in floating point.
            assert!((longest / 2 - MILLISECOND..=longest + MILLISECOND).contains(&pause), "{pause:?} of {longest:?}");
            if doubled == 11 {
                last_pauses.push(pause);
            }
        }
    }
    let (low, high) = (MAX_PAUSE.mul_f64(0.6), MAX_PAUSE.mul_f64(0.9));
    assert!(last_pauses.iter().any(|pause| *pause < low), "{last_pauses:?}");
    assert!(last_pauses.iter().any(|pause| *pause > high), "{last_pauses:?}");
}

#[test]
fn a_pause_ends_with_another_attempt() {
    let now = Instant::now();
    let mut supervisor = disconnected(now, Duration::ZERO);
    let pause = pause_of(&mut supervisor, now);
    assert!(matches!(supervisor.next_step(now + pause - Duration::from_nanos(1)), Step::WaitUntil(..)));
    assert_eq!(supervisor.next_step(now + pause), Step::Connect);
}

#[test]
fn only_a_connection_that_lasted_resets_the_pauses() {
    let now = Instant::now();
    for (lasted, is_reset) in [(MAX_PAUSE, false), (MAX_PAUSE + MILLISECOND, true)] {
        let mut supervisor = disconnected(now, Duration::from_secs(1));
        let attempt = now + MAX_PAUSE;
        assert_eq!(supervisor.next_step(attempt), Step::Connect);
        supervisor.connected((), attempt);
        assert_eq!(supervisor.disconnected(attempt + lasted), Some(()));
        let pause = pause_of(&mut supervisor, attempt + lasted);
        assert_eq!(pause < Duration::from_millis(51), is_reset, "{pause:?} after {lasted:?}");
    }
}

#[test]
fn a_call_ends_a_long_pause_but_many_calls_do_not_end_a_short_one() {
    let now = Instant::now();
    let mut long = disconnected(now, Duration::from_secs(1));
    let mut short = disconnected(now, Duration::ZERO);
    let before = pause_of(&mut short, now);
    for _ in 0..3 {
        long.reconnect_now();
        short.reconnect_now();
        assert_eq!(pause_of(&mut long, now), PAUSE_WHEN_CALLED);
        assert_eq!(pause_of(&mut short, now), before);
    }
}

#[test]
fn a_connection_is_probed_when_it_is_idle_and_when_a_call_timed_out() {
    let now = Instant::now();
    let mut supervisor = Supervisor::new(now);
    supervisor.connected((), now);
    let idle = now + PROBE_INTERVAL;
    assert_eq!(supervisor.next_step(idle), Step::Probe(&mut ()));
    supervisor.answered(idle);
    assert_eq!(supervisor.next_step(idle), Step::WaitUntil(idle + PROBE_INTERVAL, Some(&mut ())));
    supervisor.probe_now(idle);
    assert_eq!(supervisor.next_step(idle), Step::Probe(&mut ()));
}
