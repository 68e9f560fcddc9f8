//! Credentials that change, by paused time.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::Instant;

use super::super::peer::Played;
use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn wrong_password() -> StoreError {
    StoreError::Refused { code: "WRONGPASS".to_owned(), detail: "invalid".to_owned() }
}

fn password(credentials: &mut Credentials) -> String {
    match credentials.current() {
        Ok(login) => login.map(|login| login.password).unwrap_or_default(),
        Err(error) => error.to_string(),
    }
}

#[tokio::test(start_paused = true)]
async fn credentials_are_renewed_in_time_and_soon_after_a_refusal() {
    let source = Played::new(Ok("one"));
    let mut credentials = Credentials::from_source(source.clone(), SECOND, || {}).await;
    assert_eq!((password(&mut credentials).as_str(), source.asked()), ("one", 1));
    let begin = Instant::now();
    source.set(Ok("two"));
    credentials.changed().await;
    assert_eq!((password(&mut credentials).as_str(), begin.elapsed().as_secs()), ("two", 60));
    source.set(Ok("three"));
    credentials.refused(wrong_password());
    credentials.changed().await;
    assert_eq!((password(&mut credentials).as_str(), begin.elapsed().as_secs()), ("three", 61));
}

#[tokio::test(start_paused = true)]
async fn refusals_do_not_ask_the_source_more_often_than_once_in_a_second() {
    let source = Played::new(Ok("one"));
    let mut credentials = Credentials::from_source(source.clone(), SECOND, || {}).await;
    assert_eq!(password(&mut credentials), "one");
    for _ in 0..1000 {
        credentials.refused(wrong_password());
        sleep(SECOND / 100).await;
    }
    assert!((9..=11).contains(&source.asked()), "{}", source.asked());
    let unchanged = timeout(100 * SECOND, credentials.changed()).await;
    assert!(unchanged.is_err(), "the same credentials are no change");
}

#[tokio::test(start_paused = true)]
async fn a_source_that_fails_leaves_the_credentials_and_explains_a_refusal() {
    let source = Played::new(Err("no file"));
    let mut credentials = Credentials::from_source(source.clone(), SECOND, || {}).await;
    assert!(password(&mut credentials).contains("no file"));
    source.set(Ok("one"));
    credentials.changed().await;
    assert_eq!(password(&mut credentials), "one");
    source.set(Err("an empty file"));
    sleep(100 * SECOND).await;
    assert_eq!(password(&mut credentials), "one");
    let explained = credentials.refused(wrong_password()).to_string();
    assert!(explained.contains("WRONGPASS") && explained.contains("an empty file"), "{explained}");
    source.set(Ok("one"));
    sleep(10 * SECOND).await;
    assert_eq!(credentials.refused(wrong_password()), wrong_password());
}

#[tokio::test(start_paused = true)]
async fn a_source_that_panics_is_asked_again_and_the_task_ends_with_the_credentials() {
    let (source, panics) = (Played::new(Ok("panic")), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&panics);
    let on_panic = move || {
        counted.fetch_add(1, Ordering::Relaxed);
    };
    let mut credentials = Credentials::from_source(source.clone(), SECOND / 2, on_panic).await;
    source.set(Ok("one"));
    credentials.changed().await;
    assert_eq!((password(&mut credentials).as_str(), panics.load(Ordering::Relaxed)), ("one", 1));
    drop(credentials);
    let asked = source.asked();
    sleep(1000 * SECOND).await;
    assert_eq!(source.asked(), asked);
}

#[test]
fn no_password_is_shown() {
    let long = "0123456789".repeat(100);
    for (password, error) in [
        ("s3cret", "unknown command 'AUTH', with args beginning with: 'u' 's3cret' ".to_owned()),
        ("s3cret", "what is s3cret?".to_owned()),
        (&long, format!("what is {long}?")),
        (&long, format!("what is '{}'?", &long[..128])),
        ("", "what is this?".to_owned()),
    ] {
        let login = Login { user: Some("u".to_owned()), password: password.to_owned() };
        let shown = format!("{} {login:?} {:?}", login.redact(&error), Credentials::fixed(Some(login.clone())));
        assert!(!shown.contains("s3cret") && !shown.contains("01234567890123456789012345678901"), "{shown}");
        assert!(shown.contains("unknown command 'AUTH'") || shown.contains("what is "), "{shown}");
    }
}

/// A directory that is removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("balancer-store-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

async fn read(path: PathBuf) -> Result<String, String> {
    let file = PasswordFile { path, user: Some("balancer".to_owned()) };
    file.login().await.map(|(login, _)| login.password).map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_password_file_gives_its_text_without_the_newline() {
    let directory = Directory::new("text");
    let path = directory.path().join("password");
    for (text, expected) in [("s3cret", "s3cret"), ("s3cret\n", "s3cret"), ("s3 cret \r\n", "s3 cret ")] {
        fs::write(&path, text).unwrap();
        assert_eq!(read(path.clone()).await.as_deref(), Ok(expected));
    }
}

#[tokio::test]
async fn a_password_file_that_cannot_be_used_is_an_error_that_says_why() {
    let directory = Directory::new("invalid");
    let path = directory.path().join("password");
    let long = "s3cret".repeat(1000);
    let texts =
        [(&b""[..], "is empty"), (b"\n", "is empty"), (long.as_bytes(), "longer than"), (b"s3cret\xff", "UTF-8")];
    for (text, reason) in texts {
        fs::write(&path, text).unwrap();
        let error = read(path.clone()).await.unwrap_err();
        assert!(error.contains(reason) && error.contains("/password") && !error.contains("s3cret"), "{error}");
    }
    let missing = read(directory.path().join("missing")).await.unwrap_err();
    assert!(missing.contains("No such file") && missing.contains("/missing"), "{missing}");
    let no_file = read(directory.path().to_owned()).await.unwrap_err();
    assert!(no_file.contains("not a file"), "{no_file}");
}

#[tokio::test]
async fn a_renewed_kubernetes_secret_is_read() {
    let directory = Directory::new("secret");
    let path = |name: &str| directory.path().join(name);
    for version in ["one", "two"] {
        fs::create_dir(path(version)).unwrap();
        fs::write(path(version).join("password"), version).unwrap();
    }
    // As the kubelet does it.
    symlink("one", path("..data")).unwrap();
    symlink("..data/password", path("password")).unwrap();
    assert_eq!(read(path("password")).await.as_deref(), Ok("one"));
    symlink("two", path("..data_tmp")).unwrap();
    fs::rename(path("..data_tmp"), path("..data")).unwrap();
    assert_eq!(read(path("password")).await.as_deref(), Ok("two"));
}
