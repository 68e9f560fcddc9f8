//! The secret tokens in the paths of reviews. Only the apiserver knows them, from the webhook configurations, so that
//! reaching the port is not enough to change a ledger.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use arc_swap::ArcSwap;
use constant_time_eq::constant_time_eq;
use prometheus_client::metrics::counter::Counter;

use crate::reload::{Reload, read};

/// A rotation needs three: the one that the webhook configurations have, the next one, which every replica must know
/// before a configuration has it, and the previous one, until no configuration has it.
const MAX_TOKENS: usize = 3;
/// 16 random characters of the 36 that a webhook configuration allows have 82 bits.
const MIN_LENGTH: usize = 16;
/// Each admission compares every byte of every token.
const MAX_LENGTH: usize = 128;

/// The tokens of `ADMISSION_TOKEN_PATH`.
pub struct Tokens {
    path: PathBuf,
    tokens: ArcSwap<Vec<Token>>,
    failures: Counter,
}

#[derive(Clone, PartialEq, Eq)]
struct Token(Box<[u8]>);

impl fmt::Debug for Tokens {
    /// Without the tokens.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Tokens {
    /// Reads the tokens of a file, and counts later failures to do so.
    ///
    /// # Errors
    /// The file cannot be read, or does not hold 1 to 3 tokens. The error names the setting, and no token.
    pub fn load(path: PathBuf, failures: Counter) -> anyhow::Result<Self> {
        let tokens = Self::read(&path)?;
        Ok(Self { path, tokens: ArcSwap::from_pointee(tokens), failures })
    }

    /// Whether this part of a path is one of the tokens. The time that it takes depends on lengths only.
    pub fn accept(&self, candidate: &str) -> bool {
        let candidate = candidate.as_bytes();
        // Every token is compared, also after one that is equal.
        self.tokens.load().iter().fold(false, |accepted, Token(token)| accepted | constant_time_eq(token, candidate))
    }

    fn read(path: &Path) -> anyhow::Result<Vec<Token>> {
        parse(&read(path, "ADMISSION_TOKEN_PATH")?).with_context(|| format!("ADMISSION_TOKEN_PATH {}", path.display()))
    }
}

impl Reload for Tokens {
    fn reload(&self) -> anyhow::Result<bool> {
        let tokens = Self::read(&self.path)?;
        let changed = **self.tokens.load() != tokens;
        if changed {
            self.tokens.store(tokens.into());
        }
        Ok(changed)
    }

    fn failures(&self) -> &Counter {
        &self.failures
    }

    fn log_change(&self) {
        tracing::info!(tokens = self.tokens.load().len(), "admission tokens reloaded");
    }

    fn log_failure(&self, error: &str) {
        tracing::error!(error, "cannot load the changed admission tokens; the previous ones stay in use");
    }
}

/// The tokens in a file, one on each line that is not blank. Errors never contain what a line has.
fn parse(file: &[u8]) -> anyhow::Result<Vec<Token>> {
    let lines = file.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).enumerate();
    let mut tokens = Vec::with_capacity(MAX_TOKENS);
    for (number, line) in lines.filter(|(_, line)| !line.is_empty()) {
        let is_token = (MIN_LENGTH..=MAX_LENGTH).contains(&line.len())
            && line.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        if !is_token {
            bail!(
                "line {} is not a token; accepted: {MIN_LENGTH} to {MAX_LENGTH} letters, digits, '-' and '_'",
                number + 1
            );
        }
        if tokens.len() == MAX_TOKENS {
            bail!("there are more than {MAX_TOKENS} tokens; accepted: 1 to {MAX_TOKENS}, one on each line");
        }
        tokens.push(Token(line.into()));
    }
    if tokens.is_empty() {
        bail!("there is no token; accepted: 1 to {MAX_TOKENS}, one on each line");
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "0123456789abcdef";
    const SECOND: &str = "fedcba9876543210-_XYZ";

    fn accepted(tokens: &Tokens, candidates: &[&str]) -> Vec<bool> {
        candidates.iter().map(|candidate| tokens.accept(candidate)).collect()
    }

    /// A file of its own, which is removed at the end.
    struct File(PathBuf);

    impl File {
        fn new(name: &str, text: &str) -> Self {
            let path = std::env::temp_dir().join(format!("spot-balancer-tokens-{}-{name}", std::process::id()));
            std::fs::write(&path, text).expect("the file can be written");
            Self(path)
        }

        fn write(&self, text: &str) {
            std::fs::write(&self.0, text).expect("the file can be written");
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn a_token_is_accepted_only_as_it_is_written() {
        let file = File::new("exact", &format!("\n  {FIRST}\t\r\n\n{SECOND}"));
        let tokens = Tokens::load(file.0.clone(), Counter::default()).expect("two tokens");
        assert_eq!(accepted(&tokens, &[FIRST, SECOND]), [true, true]);
        for other in [
            "",
            "0123456789abcde",
            "0123456789abcdeg",
            "0123456789abcdef0",
            "0123456789ABCDEF",
            "0123456789abcdef/",
            "%30123456789abcdef",
            "0123456789abcde%66",
            " 0123456789abcdef",
            "0123456789abcdef\nfedcba9876543210-_XYZ",
        ] {
            assert!(!tokens.accept(other), "{other:?}");
        }
    }

    #[test]
    fn changed_tokens_replace_those_before_them_and_a_bad_file_changes_nothing() {
        let file = File::new("reload", FIRST);
        let tokens = Tokens::load(file.0.clone(), Counter::default()).expect("a token");
        assert!(!tokens.reload().expect("the file is unchanged"));
        file.write(&format!("{SECOND}\n{FIRST}\n"));
        assert!(tokens.reload().expect("the file has two tokens"));
        assert_eq!(accepted(&tokens, &[FIRST, SECOND]), [true, true]);
        file.write(SECOND);
        assert!(tokens.reload().expect("the file has one token"));
        assert_eq!(accepted(&tokens, &[FIRST, SECOND]), [false, true]);
        file.write("");
        assert!(tokens.reload().is_err());
        std::fs::remove_file(&file.0).expect("the file is there");
        assert!(tokens.reload().is_err());
        assert_eq!(accepted(&tokens, &[FIRST, SECOND]), [false, true]);
    }

    #[test]
    fn an_invalid_file_is_refused_by_an_error_that_names_the_setting_and_no_token() {
        for (name, text, reason) in [
            ("empty", " \n\n".to_owned(), "there is no token"),
            ("short", format!("{FIRST}\nsecret-of-15-ch\n"), "line 2 is not a token; accepted: 16 to 128"),
            ("long", "secret".repeat(22), "line 1 is not a token"),
            ("space", format!("{FIRST} {SECOND}"), "line 1 is not a token"),
            ("slash", format!("/mutate/{FIRST}"), "line 1 is not a token"),
            ("four", format!("{FIRST}\n").repeat(4), "more than 3 tokens"),
        ] {
            let file = File::new(name, &text);
            let error = Tokens::load(file.0.clone(), Counter::default()).expect_err(name);
            let error = format!("{error:#}");
            assert!(error.starts_with("ADMISSION_TOKEN_PATH /") && error.contains(reason), "{error}");
            assert!(!error.contains("secret") && !error.contains(FIRST), "{error}");
        }
        let missing = Tokens::load(PathBuf::from("/nowhere/tokens"), Counter::default()).expect_err("no such file");
        assert!(format!("{missing:#}").starts_with("ADMISSION_TOKEN_PATH: cannot open /nowhere/tokens"), "{missing:#}");
    }

    #[test]
    fn tokens_are_not_printed() {
        let file = File::new("debug", FIRST);
        let tokens = Tokens::load(file.0.clone(), Counter::default()).expect("a token");
        assert!(!format!("{tokens:#?}").contains(FIRST));
    }
}
