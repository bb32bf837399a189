//! Writing GGUF, version 3: the file that llama.cpp reads.
//!
//! Little-endian. `GGUF`, version, number of tensors, number of metadata entries, the entries, one description per
//! tensor, zeros up to the alignment, and the tensors' bytes, each starting at a multiple of the alignment.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::quant_type::{QuantType, Random};

/// What a file has if its metadata do not say otherwise.
const ALIGNMENT: u64 = 32;
/// Numbers that are made at a time: a multiple of every type's block, 4 MiB at most.
const NUMBERS_AT_A_TIME: u64 = 1 << 20;

/// A value of the metadata.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Text(&'static str),
}

/// One tensor, whose numbers are made while they are written.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// Innermost dimension first, as the format has it.
    pub(crate) shape: Vec<u64>,
    pub(crate) quant_type: QuantType,
    pub(crate) content: Content,
}

/// What the numbers of a tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// All one; only of `F32`.
    Ones,
    /// Random with mean near zero and a standard deviation near two to this power.
    Random { std_log2: i32 },
}

impl Tensor {
    fn num_numbers(&self) -> u64 {
        self.shape.iter().product()
    }

    pub(crate) fn num_bytes(&self) -> u64 {
        self.quant_type.num_bytes(self.num_numbers())
    }
}

/// Bytes that the tensors take in a file.
pub(crate) fn data_bytes(tensors: &[Tensor]) -> u64 {
    tensors.iter().map(|tensor| tensor.num_bytes().next_multiple_of(ALIGNMENT)).sum()
}

/// Write a whole file, under another name until it is complete; the same arguments give the same bytes. `progress`
/// is told how many bytes are written.
pub(crate) fn write_file(
    path: &Path,
    metadata: &[(String, Value)],
    tensors: &[Tensor],
    mut progress: impl FnMut(u64),
) -> Result<()> {
    let partial = path.with_extension("partial");
    let in_file = || format!("cannot write {}", partial.display());
    let mut out = BufWriter::with_capacity(1 << 20, File::create(&partial).with_context(in_file)?);
    let mut written = 0;
    out.write_all(&header(metadata, tensors)?).with_context(in_file)?;
    let mut buffer = Vec::new();
    for (tensor, seed) in tensors.iter().zip(0..) {
        let mut random = Random::new(seed);
        let mut left = tensor.num_numbers();
        while left > 0 {
            let num_numbers = left.min(NUMBERS_AT_A_TIME);
            buffer.clear();
            match tensor.content {
                Content::Ones => (0..num_numbers).for_each(|_| buffer.extend(1f32.to_le_bytes())),
                Content::Random { std_log2 } => {
                    tensor.quant_type.fill(&mut buffer, num_numbers, std_log2, &mut random);
                }
            }
            out.write_all(&buffer).with_context(in_file)?;
            left -= num_numbers;
            written += buffer.len() as u64;
            progress(written);
        }
        out.write_all(&padding(tensor.num_bytes())).with_context(in_file)?;
    }
    out.into_inner().map_err(|error| error.into_error()).and_then(|file| file.sync_all()).with_context(in_file)?;
    fs::rename(&partial, path).with_context(|| format!("cannot rename {}", partial.display()))
}

/// Everything before the first tensor's bytes.
fn header(metadata: &[(String, Value)], tensors: &[Tensor]) -> Result<Vec<u8>> {
    let mut out = Vec::from(*b"GGUF");
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut out, key);
        match value {
            Value::U32(number) => {
                out.extend(4u32.to_le_bytes());
                out.extend(number.to_le_bytes());
            }
            Value::F32(number) => {
                out.extend(6u32.to_le_bytes());
                out.extend(number.to_le_bytes());
            }
            Value::Text(text) => {
                out.extend(8u32.to_le_bytes());
                put_text(&mut out, text);
            }
        }
    }
    let mut offset = 0u64;
    for tensor in tensors {
        let (width, block) = (tensor.shape[0], tensor.quant_type.numbers_per_block());
        if !width.is_multiple_of(block) {
            bail!("{}: width {width} is not a multiple of {block}, the block of {:?}", tensor.name, tensor.quant_type);
        }
        put_text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
        out.extend(tensor.quant_type.id().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += tensor.num_bytes().next_multiple_of(ALIGNMENT);
    }
    let end = padding(out.len() as u64);
    out.extend(end);
    Ok(out)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The zeros that follow `len` bytes.
fn padding(len: u64) -> Vec<u8> {
    vec![0; (len.next_multiple_of(ALIGNMENT) - len) as usize]
}

#[cfg(test)]
mod tests {
    use super::{ALIGNMENT, Content, Tensor, Value, data_bytes, header, write_file};
    use crate::peers::quant_type::QuantType;

    fn tensor(name: &str, shape: &[u64], quant_type: QuantType, content: Content) -> Tensor {
        Tensor { name: name.to_string(), shape: shape.to_vec(), quant_type, content }
    }

    /// A norm of 12 bytes, which the alignment does not divide, and a matrix of 3 rows after it.
    fn two_tensors() -> [Tensor; 2] {
        [
            tensor("norm", &[3], QuantType::F32, Content::Ones),
            tensor("matrix", &[64, 5], QuantType::Q4_0, Content::Random { std_log2: -6 }),
        ]
    }

    struct Reader<'a>(&'a [u8]);

    impl Reader<'_> {
        fn take<const N: usize>(&mut self) -> [u8; N] {
            let (taken, rest) = self.0.split_first_chunk().unwrap();
            self.0 = rest;
            *taken
        }

        fn u32(&mut self) -> u32 {
            u32::from_le_bytes(self.take())
        }

        fn u64(&mut self) -> u64 {
            u64::from_le_bytes(self.take())
        }

        fn text(&mut self) -> String {
            let (text, rest) = self.0.split_at(u64::from_le_bytes(self.0[..8].try_into().unwrap()) as usize + 8);
            self.0 = rest;
            String::from_utf8(text[8..].to_vec()).unwrap()
        }
    }

    #[test]
    fn the_header_says_what_the_file_holds_and_where() {
        let metadata = [
            ("general.architecture".to_string(), Value::Text("qwen3")),
            ("qwen3.block_count".to_string(), Value::U32(7)),
            ("qwen3.rope.freq_base".to_string(), Value::F32(1e6)),
        ];
        let bytes = header(&metadata, &two_tensors()).unwrap();
        let mut reader = Reader(&bytes);
        assert_eq!(&reader.take(), b"GGUF");
        assert_eq!((reader.u32(), reader.u64(), reader.u64()), (3, 2, 3));
        assert_eq!((reader.text(), reader.u32(), reader.text()), ("general.architecture".into(), 8, "qwen3".into()));
        assert_eq!((reader.text(), reader.u32(), reader.u32()), ("qwen3.block_count".into(), 4, 7));
        assert_eq!((reader.text(), reader.u32(), reader.u32()), ("qwen3.rope.freq_base".into(), 6, 1e6f32.to_bits()));
        // Name, number of dimensions, dimensions, type, offset in the data.
        assert_eq!((reader.text(), reader.u32(), reader.u64()), ("norm".into(), 1, 3));
        assert_eq!((reader.u32(), reader.u64()), (0, 0));
        assert_eq!((reader.text(), reader.u32(), reader.u64(), reader.u64()), ("matrix".into(), 2, 64, 5));
        assert_eq!((reader.u32(), reader.u64()), (2, 32));
        assert!(reader.0.len() < ALIGNMENT as usize && reader.0.iter().all(|&byte| byte == 0), "{:?}", reader.0);
        assert!((bytes.len() as u64).is_multiple_of(ALIGNMENT));
    }

    #[test]
    fn a_file_is_its_header_and_the_aligned_tensors_and_the_same_every_time() {
        let path = std::env::temp_dir().join(format!("gguf-writer-test-{}.gguf", std::process::id()));
        let tensors = two_tensors();
        let mut last = 0;
        write_file(&path, &[], &tensors, |written| last = written).unwrap();
        let first = std::fs::read(&path).unwrap();
        write_file(&path, &[], &tensors, |_| ()).unwrap();
        let second = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(first, second);
        let data = &first[header(&[], &tensors).unwrap().len()..];
        // 5 rows of 2 blocks of 18 bytes end 12 bytes before a multiple of 32.
        assert_eq!((data.len() as u64, data_bytes(&tensors), last), (224, 224, 192));
        assert_eq!(data[..12], [1f32.to_le_bytes(); 3].concat());
        assert_eq!((&data[12..32], &data[212..]), (&[0; 20][..], &[0; 12][..]));
        assert!(data[32..212].iter().any(|&byte| byte != 0));
    }

    #[test]
    fn a_width_that_the_block_does_not_divide_is_refused() {
        let narrow = tensor("narrow", &[1344, 2], QuantType::Q4K, Content::Random { std_log2: -6 });
        let error = header(&[], &[narrow]).unwrap_err().to_string();
        assert_eq!(error, "narrow: width 1344 is not a multiple of 256, the block of Q4K");
    }
}
