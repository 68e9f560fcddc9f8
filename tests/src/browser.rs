//! A real browser: Chromium without a window, spoken to by the DevTools protocol over two pipes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe;
use tokio::time::timeout;

use crate::parts::program;
use crate::process::{Process, scratch_path};
use crate::wait::until;

/// Of one command. Chromium takes some seconds to start.
const ANSWER: Duration = Duration::from_secs(60);
/// Until a page shows what it should.
const SHOWN: Duration = Duration::from_secs(20);

/// A browser with one page. Dropping it kills it.
pub struct Browser {
    process: Process,
    commands: pipe::Sender,
    messages: BufReader<pipe::Receiver>,
    session: Option<String>,
    last_id: u64,
    events: Vec<Value>,
}

impl Browser {
    /// Starts Chromium with an empty page.
    pub async fn start() -> Result<Self> {
        let [commands, messages] = [fifo("commands")?, fifo("messages")?];
        let receiver = pipe::OpenOptions::new().open_receiver(&messages)?;
        // Also for reading, because nobody reads yet.
        let sender = pipe::OpenOptions::new().read_write(true).open_sender(&commands)?;
        let profile = scratch_path("profile")?;
        let process = Process::start(Path::new("/bin/sh"), |shell| {
            // Chromium reads commands from descriptor 3, and writes to 4.
            shell.args(["-c", r#"exec "$0" "$@" 3<"$COMMANDS" 4>"$MESSAGES""#]);
            shell.arg(program("chromium").unwrap_or_default()).env("COMMANDS", &commands).env("MESSAGES", &messages);
            shell.args(["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"]);
            shell.args(["--disable-dev-shm-usage", "--disable-breakpad", "--hide-scrollbars"]);
            // Root has no sandbox. What is opened is ours.
            shell.arg("--no-sandbox").arg(format!("--user-data-dir={}", profile.display())).arg("about:blank");
        })?;
        let messages = BufReader::new(receiver);
        let mut browser = Self { process, commands: sender, messages, session: None, last_id: 0, events: Vec::new() };
        let page = browser.call("Target.createTarget", json!({"url": "about:blank"})).await?;
        let attach = json!({"targetId": page["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach).await?;
        browser.session = Some(attached["sessionId"].as_str().context("no session")?.to_owned());
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({})).await?;
        }
        browser.call("Emulation.setFocusEmulationEnabled", json!({"enabled": true})).await?;
        Ok(browser)
    }

    /// Opens an address in a window of this size.
    pub async fn open(&mut self, url: &str, width: u32, height: u32) -> Result<()> {
        self.resize(width, height).await?;
        let opened = self.call("Page.navigate", json!({"url": url})).await?;
        ensure!(opened["errorText"].is_null(), "{url}: {opened}");
        Ok(())
    }

    /// Changes the size of the window.
    pub async fn resize(&mut self, width: u32, height: u32) -> Result<()> {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size).await?;
        Ok(())
    }

    /// Whether people prefer `light` or `dark` pages.
    pub async fn prefer(&mut self, scheme: &str) -> Result<()> {
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", features).await?;
        Ok(())
    }

    /// The value of an expression in the page.
    pub async fn value(&mut self, expression: &str) -> Result<Value> {
        let parameters = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let answer = self.call("Runtime.evaluate", parameters).await?;
        ensure!(answer["exceptionDetails"].is_null(), "{expression}: {}", answer["exceptionDetails"]);
        Ok(answer["result"]["value"].clone())
    }

    /// Waits until an expression has this value.
    pub async fn until(&mut self, expression: &str, wanted: impl Into<Value>) -> Result<()> {
        let wanted = wanted.into();
        let mut last = Value::Null;
        let reached = until(SHOWN, expression, async || {
            last = self.value(expression).await?;
            Ok((last == wanted).then_some(()))
        });
        reached.await.with_context(|| format!("{expression} is {last}, not {wanted}"))
    }

    /// Presses a key: `Tab`, `Enter`, `Space` or `ArrowDown`.
    pub async fn press(&mut self, code: &str) -> Result<()> {
        let (key, number, text) = match code {
            "Tab" => ("Tab", 9, ""),
            "Enter" => ("Enter", 13, "\r"),
            "Space" => (" ", 32, " "),
            "ArrowDown" => ("ArrowDown", 40, ""),
            other => bail!("{other} is no key of the tests"),
        };
        let event = |kind: &str, text: &str| json!({"type": kind, "key": key, "code": code, "windowsVirtualKeyCode": number, "text": text});
        self.call("Input.dispatchKeyEvent", event(if text.is_empty() { "rawKeyDown" } else { "keyDown" }, text))
            .await?;
        self.call("Input.dispatchKeyEvent", event("keyUp", "")).await?;
        Ok(())
    }

    /// Types a text into what has the focus.
    pub async fn write(&mut self, text: &str) -> Result<()> {
        self.call("Input.insertText", json!({"text": text})).await?;
        Ok(())
    }

    /// Saves a picture of the window, and returns its size in bytes.
    pub async fn screenshot(&mut self, path: &Path) -> Result<usize> {
        let answer = self.call("Page.captureScreenshot", json!({"format": "png"})).await?;
        let picture = STANDARD.decode(answer["data"].as_str().context("no picture")?)?;
        std::fs::write(path, &picture).with_context(|| format!("writing {}", path.display()))?;
        Ok(picture.len())
    }

    /// The role and the name of everything that a screen reader finds.
    pub async fn accessible(&mut self) -> Result<Vec<(String, String)>> {
        let tree = self.call("Accessibility.getFullAXTree", json!({})).await?;
        let text = |node: &Value, field: &str| node[field]["value"].as_str().unwrap_or_default().to_owned();
        let nodes = tree["nodes"].as_array().context("no tree")?;
        Ok(nodes.iter().map(|node| (text(node, "role"), text(node, "name"))).collect())
    }

    /// The errors and warnings in the console, and exceptions that nothing caught.
    pub async fn complaints(&mut self) -> Result<Vec<String>> {
        // What was sent before this answer has arrived.
        self.value("0").await?;
        let is_complaint = |event: &&Value| match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Runtime.consoleAPICalled") => {
                ["error", "warning", "assert"].iter().any(|kind| event["params"]["type"] == *kind)
            }
            Some("Log.entryAdded") => {
                ["error", "warning"].iter().any(|level| event["params"]["entry"]["level"] == *level)
            }
            _ => false,
        };
        Ok(self.events.iter().filter(is_complaint).map(|event| event["params"].to_string()).collect())
    }

    /// The addresses of everything that pages have loaded.
    pub fn loaded(&self) -> Vec<String> {
        let requests = self.events.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        requests.filter_map(|event| Some(event["params"]["request"]["url"].as_str()?.to_owned())).collect()
    }

    /// Sends a command, and returns its result.
    async fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.last_id += 1;
        let mut command = json!({"id": self.last_id, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            command["sessionId"] = json!(session);
        }
        let result = timeout(ANSWER, async {
            self.commands.write_all(format!("{command}\0").as_bytes()).await?;
            loop {
                let mut message = Vec::new();
                ensure!(self.messages.read_until(0, &mut message).await? > 0, "Chromium has ended");
                message.pop();
                let message: Value = serde_json::from_slice(&message)?;
                if message["id"] == self.last_id {
                    return Ok(message);
                }
                self.events.push(message);
            }
        });
        let answer = result.await.with_context(|| format!("{method}: no answer"));
        let answer =
            answer.and_then(|answer| answer).with_context(|| format!("{method}: {}", self.process.log_tail()))?;
        ensure!(answer["error"].is_null(), "{method}: {}", answer["error"]);
        Ok(answer["result"].clone())
    }
}

/// A new named pipe.
fn fifo(name: &str) -> Result<PathBuf> {
    let path = scratch_path(name)?;
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).with_context(|| format!("making {name}"))?;
    Ok(path)
}
