//! The scripts, composed when this crate is compiled, each with the hash that calls it.

/// One script and its hash.
pub(super) struct Script(redis::Script, &'static str);

impl Script {
    fn new(code: &'static str) -> Self {
        Self(redis::Script::new(code), code)
    }

    /// The hash that `EVALSHA` takes.
    pub(super) fn sha(&self) -> &str {
        self.0.get_hash()
    }

    /// The code that `SCRIPT LOAD` takes.
    pub(super) const fn code(&self) -> &'static str {
        self.1
    }
}

/// A script's file after the files that it shares with others.
macro_rules! script {
    ($($file:literal),+) => { Script::new(concat!($(include_str!($file)),+)) };
}

/// One script for each call of a ledger.
pub(super) struct Scripts {
    pub(super) place: Script,
    pub(super) peek: Script,
    pub(super) release: Script,
    pub(super) learn: Script,
    pub(super) reconcile: Script,
    pub(super) counts: Script,
    pub(super) heartbeat: Script,
    pub(super) get: Script,
}

impl Default for Scripts {
    fn default() -> Self {
        Self {
            place: script!("shared.lua", "decide.lua", "place.lua"),
            peek: script!("shared.lua", "decide.lua", "peek.lua"),
            release: script!("shared.lua", "release.lua"),
            learn: script!("shared.lua", "learn.lua"),
            reconcile: script!("shared.lua", "reconcile.lua"),
            counts: script!("shared.lua", "counts.lua"),
            heartbeat: script!("heartbeat.lua"),
            get: script!("get.lua"),
        }
    }
}
