//! Opens an event log of Spark, and reads its lines in bounded memory: one file or a folder of rolled files, plain or
//! compressed.
//!
//! Names and order are those of Spark's `EventLogFileWriters` and `EventLogFileCompactor`.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;

/// What the folder of a rolled log is named, and the files of events in it.
const ROLLED_FOLDER: &str = "eventlog_v2_";
const ROLLED_FILE: &str = "events_";
/// What Spark appends while it writes, and to a file into which it has merged the ones before.
const UNFINISHED: &str = ".inprogress";
const COMPACTED: &str = ".compact";

/// Why an event log cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogFileError {
    /// The path leads nowhere, or may not be read.
    #[error("cannot open the event log {path}: {cause}")]
    Open {
        /// The path.
        path: String,
        /// The cause.
        cause: io::Error,
    },
    /// A file could be opened, but not read or decompressed.
    #[error("cannot read the event log {path}: {cause}")]
    Read {
        /// The path.
        path: String,
        /// The cause.
        cause: io::Error,
    },
    /// A folder, but not of a rolled log.
    #[error(
        "{path} is a folder; accepted: the file of one application, or its folder {ROLLED_FOLDER}*, in which Spark keeps a \
         rolled log"
    )]
    Folder {
        /// The path.
        path: String,
    },
    /// The folder of a rolled log without files of events.
    #[error("{path} has no files {ROLLED_FILE}*; copy the whole folder of the application")]
    EmptyFolder {
        /// The path.
        path: String,
    },
    /// An address of an object store.
    #[error("{path} is not on this machine; copy the event log here first, such as by aws s3 cp")]
    Remote {
        /// The address.
        path: String,
    },
    /// A compression of Spark that this program does not read.
    #[error(
        "{path} is compressed with {codec}, which cannot be read here; accepted: plain, .zstd and .gz. Spark writes .zstd \
         with spark.eventLog.compression.codec=zstd, its default since 3.0"
    )]
    Compression {
        /// The path.
        path: String,
        /// The compression, as the name ends.
        codec: &'static str,
    },
}

/// One line of a log.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// Its bytes are in the buffer.
    Whole,
    /// It is longer than the limit, and was passed over.
    TooLong,
    /// There are no more lines.
    End,
}

/// The files of a log, in the order in which they were written.
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>, LogFileError> {
    let shown = path.display().to_string();
    if shown.contains("://") {
        return Err(LogFileError::Remote { path: shown });
    }
    let open = |cause| LogFileError::Open { path: shown.clone(), cause };
    if !fs::metadata(path).map_err(open)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let canonical = path.canonicalize().map_err(open)?;
    if !name(&canonical).starts_with(ROLLED_FOLDER) {
        return Err(LogFileError::Folder { path: shown });
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(open)? {
        let file = entry.map_err(open)?.path();
        if let Some(index) = index(&name(&file)) {
            files.push((index, name(&file).ends_with(COMPACTED), file));
        }
    }
    // A compacted file stands for itself and for all before it, some of which may still be there.
    let first = files.iter().filter(|(_, compacted, _)| *compacted).map(|(index, ..)| *index).max();
    files.retain(|(index, compacted, _)| first.is_none_or(|first| *index > first || *index == first && *compacted));
    files.sort();
    if files.is_empty() {
        return Err(LogFileError::EmptyFolder { path: shown });
    }
    Ok(files.into_iter().map(|(.., file)| file).collect())
}

/// The number of a file of events, such as 3 for `events_3_spark-1234.zstd`.
fn index(name: &str) -> Option<u64> {
    name.strip_prefix(ROLLED_FILE)?.split('_').next()?.parse().ok()
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Whether Spark has merged files of the log into this one, and left out jobs that had ended.
pub(super) fn is_compacted(file: &Path) -> bool {
    name(file).ends_with(COMPACTED)
}

/// Opens one file. What its name ends with says how it is compressed.
pub(super) fn open(path: &Path) -> Result<Box<dyn BufRead>, LogFileError> {
    let shown = path.display().to_string();
    let file_name = name(path);
    let base = file_name.trim_end_matches(COMPACTED).trim_end_matches(UNFINISHED);
    let codec = |codec| LogFileError::Compression { path: shown.clone(), codec };
    let file = || File::open(path).map_err(|cause| LogFileError::Open { path: shown.clone(), cause });
    match base.rsplit_once('.').map(|(_, suffix)| suffix) {
        Some("zstd" | "zst") => Ok(Box::new(BufReader::new(Zstd::new(BufReader::new(file()?))))),
        Some("gz") => Ok(Box::new(BufReader::new(MultiGzDecoder::new(file()?)))),
        Some("lz4") => Err(codec("lz4")),
        Some("lzf") => Err(codec("lzf")),
        Some("snappy") => Err(codec("snappy")),
        _ => Ok(Box::new(BufReader::new(file()?))),
    }
}

/// Reads one line into the buffer, without its end. No more than `limit` bytes are kept.
pub(super) fn read_line(from: &mut dyn BufRead, buffer: &mut Vec<u8>, limit: usize) -> io::Result<Line> {
    buffer.clear();
    let (mut is_long, mut is_empty) = (false, true);
    loop {
        let chunk = match from.fill_buf() {
            Ok(chunk) => chunk,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if chunk.is_empty() {
            return Ok(if is_empty { Line::End } else { line(is_long) });
        }
        is_empty = false;
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let (part, _) = chunk.split_at(end.unwrap_or(chunk.len()));
        is_long |= buffer.len() + part.len() > limit;
        if !is_long {
            buffer.extend_from_slice(part);
        }
        let used = part.len() + usize::from(end.is_some());
        from.consume(used);
        if end.is_some() {
            return Ok(line(is_long));
        }
    }
}

fn line(is_long: bool) -> Line {
    if is_long { Line::TooLong } else { Line::Whole }
}

/// A reader of all zstd frames of a file; the decoder reads one. Spark begins another frame with each application attempt
/// that appends, and so does `cat`.
struct Zstd<R: BufRead> {
    state: Option<Frame<R>>,
}

enum Frame<R: BufRead> {
    /// The next byte begins a frame, or the file ends.
    Between(R),
    /// Inside a frame.
    Inside(Box<StreamingDecoder<R, ruzstd::decoding::FrameDecoder>>),
}

impl<R: BufRead> Zstd<R> {
    fn new(from: R) -> Self {
        Self { state: Some(Frame::Between(from)) }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // No state is left after an error: what follows cannot be decoded.
        while let Some(state) = self.state.take() {
            match state {
                Frame::Between(mut from) => {
                    if from.fill_buf()?.is_empty() {
                        return Ok(0);
                    }
                    let decoder = StreamingDecoder::new(from).map_err(io::Error::other)?;
                    self.state = Some(Frame::Inside(Box::new(decoder)));
                }
                Frame::Inside(mut decoder) => {
                    let read = decoder.read(buffer)?;
                    let is_over = read == 0 && !buffer.is_empty();
                    self.state =
                        Some(if is_over { Frame::Between(decoder.into_inner()) } else { Frame::Inside(decoder) });
                    if !is_over {
                        return Ok(read);
                    }
                }
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8], capacity: usize, limit: usize) -> Vec<(Line, String)> {
        let mut from = BufReader::with_capacity(capacity, text);
        let mut lines = Vec::new();
        loop {
            let mut buffer = Vec::new();
            match read_line(&mut from, &mut buffer, limit).expect("memory") {
                Line::End => return lines,
                line => lines.push((line, String::from_utf8(buffer).expect("text"))),
            }
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_passed_over_and_the_next_is_read() {
        for capacity in [1, 3, 100] {
            let lines = read(b"abcd\nabcde\n\nend", capacity, 4);
            let (texts, kinds): (Vec<_>, Vec<_>) = lines.into_iter().map(|(line, text)| (text, line)).unzip();
            assert_eq!(kinds, [Line::Whole, Line::TooLong, Line::Whole, Line::Whole], "capacity {capacity}");
            assert_eq!((texts[0].as_str(), texts[2].as_str(), texts[3].as_str()), ("abcd", "", "end"));
            assert!(texts[1].len() <= 4);
        }
    }

    #[test]
    fn files_of_a_rolled_log_are_read_by_number_from_the_compacted_one_on() {
        let folder = std::env::temp_dir().join(format!("advise-{}", std::process::id())).join("eventlog_v2_app-1");
        fs::create_dir_all(&folder).expect("folder");
        for file in [
            "events_1_app-1",
            "events_2_app-1",
            "events_2_app-1.compact",
            "events_10_app-1",
            "events_9_app-1",
            "appstatus_app-1",
        ] {
            fs::write(folder.join(file), "").expect("file");
        }
        let names: Vec<_> = files(&folder).expect("files").iter().map(|file| name(file)).collect();
        let parent = folder.parent().expect("parent").to_owned();
        let refused = files(&parent).expect_err("no log").to_string();
        fs::remove_dir_all(parent).expect("removed");
        assert_eq!(names, ["events_2_app-1.compact", "events_9_app-1", "events_10_app-1"]);
        assert!(refused.contains("is a folder; accepted"), "{refused}");
    }

    #[test]
    fn compressions_that_cannot_be_read_and_remote_logs_are_refused_by_name() {
        for (path, expected) in
            [("/tmp/app-1.lz4", "lz4"), ("/tmp/app-1.lzf.inprogress", "lzf"), ("x.snappy", "snappy")]
        {
            let error = open(Path::new(path)).err().expect(path).to_string();
            assert!(error.contains(&format!("compressed with {expected}")), "{error}");
        }
        let error = files(Path::new("s3://bucket/app-1")).expect_err("remote").to_string();
        assert!(error.contains("copy the event log here"), "{error}");
    }

    #[test]
    fn a_file_of_several_zstd_frames_is_read_to_its_end() {
        let compress = |text: &str| {
            ruzstd::encoding::compress_to_vec(text.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest)
        };
        let mut frames = compress("one\n");
        frames.extend(compress("two\n"));
        let mut text = String::new();
        Zstd::new(frames.as_slice()).read_to_string(&mut text).expect("two frames");
        assert_eq!(text, "one\ntwo\n");

        frames.truncate(frames.len() - 3);
        assert!(Zstd::new(frames.as_slice()).read_to_string(&mut text).is_err(), "a cut frame is an error");
    }
}
