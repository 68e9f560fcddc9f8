//! The scripts, put together when this crate is compiled, each with the hash that calls it.

/// One script and its hash.
pub(super) struct Script(redis::Script, &'static str);

impl Script {
    fn new(code: &'static str) -> Self {
        Self(redis::Script::new(code), code)
    }

    /// By what `EVALSHA` knows it.
    pub(super) fn sha(&self) -> &str {
        self.0.get_hash()
    }

    /// What `SCRIPT LOAD` takes.
    pub(super) const fn code(&self) -> &'static str {
        self.1
    }
}

/// A script's file after those of what it shares with others.
macro_rules! script {
    ($($file:literal),+) => { Script::new(concat!($(include_str!($file)),+)) };
}

/// All that a ledger is asked.
pub(super) struct Scripts {
    pub(super) place: Script,
    pub(super) peek: Script,
    pub(super) release: Script,
    pub(super) learn: Script,
    pub(super) reconcile: Script,
    pub(super) tally: Script,
    pub(super) mark: Script,
    pub(super) show: Script,
}

impl Default for Scripts {
    fn default() -> Self {
        Self {
            place: script!("shared.lua", "answer.lua", "place.lua"),
            peek: script!("shared.lua", "answer.lua", "peek.lua"),
            release: script!("shared.lua", "release.lua"),
            learn: script!("shared.lua", "learn.lua"),
            reconcile: script!("shared.lua", "reconcile.lua"),
            tally: script!("shared.lua", "tally.lua"),
            mark: script!("mark.lua"),
            show: script!("show.lua"),
        }
    }
}
