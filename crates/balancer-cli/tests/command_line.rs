//! The command line as a whole: what is accepted where, the exit codes, and what kubectl completes.

#![allow(clippy::expect_used, reason = "a test")]

use std::process::{Command, Output};

fn run(arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-spot_balancer"));
    command.args(arguments.split(' ')).output().expect("the plugin runs")
}

#[test]
fn wrong_usage_has_the_same_exit_code_whenever_it_shows() {
    for (arguments, text) in [
        ("status --no-such-flag", "--no-such-flag"),
        ("-n etl status -A", "--all-namespaces cannot be used with --namespace"),
        ("status -n etl -A", "cannot be used with"),
        ("-n etl simulate --executors 4 --hours 1", "are for status, explain and check"),
        ("simulate --executors 4 --hours 1 --pools 3 --rates 0.1,0.2", "--rates"),
    ] {
        let output = run(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments}: {error}");
        assert!(error.contains(text), "{arguments}: {error}");
    }
    let output = run("advise --event-log /no/such/file");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[test]
fn flags_may_stand_before_the_command() {
    for command in ["status", "check", "explain pod/a"] {
        let output = run(&format!("--kubeconfig /no/such/file -n etl {command}"));
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains("cannot use the kubeconfig /no/such/file"), "{error}");
    }
}

#[test]
fn kubectl_is_told_what_may_follow() {
    let output = run("__complete -n etl status --watc");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text, "--watch\tPrint again whenever something has changed, until interrupted\n:4\n");
    let output = run("__complete --help ");
    assert!(output.stdout.ends_with(b"\n:4\n"), "{output:?}");
    let output = run("__complete status --output=w");
    assert!(output.stdout.starts_with(b"--output=wide\t"), "{output:?}");
}
