//! The scripts, composed when this crate is compiled, each with the hash that calls it.

use redis::{Cmd, ToRedisArgs};

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

    /// The call of a script on one key. Its arguments follow.
    pub(super) fn on_key(&self, key: impl ToRedisArgs) -> Cmd {
        let mut command = redis::cmd("EVALSHA");
        command.arg(self.sha()).arg(1).arg(key);
        command
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
    pub(super) begin_count: Script,
    pub(super) correct_counts: Script,
    pub(super) remove_unconfirmed: Script,
    pub(super) steer: Script,
    pub(super) record: Script,
    pub(super) heartbeat: Script,
    pub(super) note_placed: Script,
    pub(super) take_placed: Script,
    pub(super) get: Script,
}

impl Default for Scripts {
    fn default() -> Self {
        Self {
            place: script!("fast_place.lua", "shared.lua", "decide.lua", "place.lua"),
            peek: script!("shared.lua", "decide.lua", "peek.lua"),
            release: script!("shared.lua", "release.lua"),
            learn: script!("shared.lua", "learn.lua"),
            reconcile: script!("shared.lua", "reconcile.lua"),
            begin_count: script!("shared.lua", "begin_count.lua"),
            correct_counts: script!("shared.lua", "correct_counts.lua"),
            remove_unconfirmed: script!("shared.lua", "remove_unconfirmed.lua"),
            steer: script!("shared.lua", "steer.lua"),
            record: script!("shared.lua", "record.lua"),
            heartbeat: script!("heartbeat.lua"),
            note_placed: script!("note_placed.lua"),
            take_placed: script!("take_placed.lua"),
            get: script!("get.lua"),
        }
    }
}

#[cfg(test)]
mod tests {
    use balancer_core::{Policy, PolicyField, PolicyOverrides};

    #[test]
    fn the_scripts_drop_the_words_of_exactly_the_default_policy() {
        let defaults = PolicyOverrides::from(Policy::DEFAULT);
        let optional = PolicyField::ALL.iter().filter(|field| !PolicyField::DECIDING.contains(field));
        let words = optional.map(|field| format!("{}={}", field.key(), defaults.value(*field).unwrap_or_default()));
        let script = include_str!("shared.lua");
        let list = script.split_once("is_default = {").and_then(|(_, rest)| rest.split_once('}')).expect("the list").0;
        let listed = list.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        assert!(listed.eq(words.map(|word| format!("['{word}'] = true"))), "{list}");
    }
}
