//! The protobuf message of a `tokenizer.model`: a reader and a writer for its fields only.
//!
//! Only the fields that change the result of encoding or decoding are kept. Everything else (training settings, self tests,
//! extensions) is skipped. In particular `split_digits`, `split_by_number`, `split_by_whitespace`,
//! `split_by_unicode_script`, `allow_whitespace_only_pieces` and the `*_id` fields steer training alone: encoding finds
//! the special pieces by their names and types.

use super::error::{Problem, SentencePieceError};

/// `TrainerSpec.ModelType` of byte-pair encoding; the default of the format is unigram.
const MODEL_TYPE_BPE: u64 = 2;

/// The fields of a `tokenizer.model` that matter after training. Its model type is always BPE.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelProto {
    /// The vocabulary; a piece's index is its token id.
    pub pieces: Vec<Piece>,
    /// Settings of training.
    pub trainer_spec: TrainerSpec,
    /// Normalisation of the text before it is split into pieces.
    pub normalizer_spec: NormalizerSpec,
}

/// The kind of a piece: what it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// Its text.
    Normal,
    /// Any text that is not in the vocabulary.
    Unknown,
    /// No text: a marker such as BOS. Its name in a text does not become this piece.
    Control,
    /// Its text, wherever it occurs, before other pieces are considered.
    UserDefined,
    /// Its text, but encoding does not yield it.
    Unused,
    /// One byte of a character that is not in the vocabulary.
    Byte(u8),
}

/// One entry of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The piece's text, with U+2581 for a space.
    pub piece: String,
    /// Among possible merges the one whose piece scores highest happens first.
    pub score: f32,
    /// The kind of the piece.
    pub kind: PieceKind,
}

/// The training settings that still matter after training.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerSpec {
    /// Spell characters outside the vocabulary with byte pieces instead of the unknown piece.
    pub byte_fallback: bool,
    /// Put the dummy space after the text instead of before it.
    pub treat_whitespace_as_suffix: bool,
    /// Text of the unknown piece when decoded.
    pub unk_surface: String,
    /// Name of the piece that begins a sequence.
    pub bos_piece: String,
    /// Name of the piece that ends a sequence.
    pub eos_piece: String,
    /// Name of the piece that pads a batch.
    pub pad_piece: String,
}

impl Default for TrainerSpec {
    /// The defaults of the format.
    fn default() -> Self {
        TrainerSpec {
            byte_fallback: false,
            treat_whitespace_as_suffix: false,
            unk_surface: " \u{2047} ".to_owned(),
            bos_piece: "<s>".to_owned(),
            eos_piece: "</s>".to_owned(),
            pad_piece: "<pad>".to_owned(),
        }
    }
}

/// Normalisation of the text before it is split into pieces.
#[derive(Clone, Debug, PartialEq)]
pub struct NormalizerSpec {
    /// Name of the rule set, informational: `precompiled_charsmap` holds the rules.
    pub name: String,
    /// Replacement rules; empty if characters stay as they are. See the `charsmap` module for the layout.
    pub precompiled_charsmap: Vec<u8>,
    /// Put a space before the text, so that its first word is spelled like any other.
    pub add_dummy_prefix: bool,
    /// Drop spaces at both ends and all but one of a run.
    pub remove_extra_whitespaces: bool,
    /// Write a space as U+2581.
    pub escape_whitespaces: bool,
}

impl Default for NormalizerSpec {
    /// The defaults of the format.
    fn default() -> Self {
        NormalizerSpec {
            name: String::new(),
            precompiled_charsmap: Vec::new(),
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        }
    }
}

impl ModelProto {
    /// Read a `tokenizer.model`; `file` is its name in errors.
    ///
    /// # Errors
    /// If the bytes are not such a message, or it asks for a feature that is not implemented: a model type other than BPE,
    /// or a denormaliser with rules.
    pub fn from_bytes(bytes: &[u8], file: &str) -> Result<ModelProto, SentencePieceError> {
        read_model(bytes).map_err(|problem| problem.in_file(file))
    }

    /// The message in the format of a `tokenizer.model`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut model = Writer::default();
        for piece in &self.pieces {
            let mut entry = Writer::default();
            entry.bytes(1, piece.piece.as_bytes());
            entry.fixed32(2, piece.score.to_bits());
            entry.varint(3, type_of(piece.kind));
            model.bytes(1, &entry.0);
        }
        let mut trainer = Writer::default();
        trainer.varint(3, MODEL_TYPE_BPE);
        trainer.varint(24, self.trainer_spec.treat_whitespace_as_suffix.into());
        trainer.varint(35, self.trainer_spec.byte_fallback.into());
        trainer.bytes(44, self.trainer_spec.unk_surface.as_bytes());
        trainer.bytes(46, self.trainer_spec.bos_piece.as_bytes());
        trainer.bytes(47, self.trainer_spec.eos_piece.as_bytes());
        trainer.bytes(48, self.trainer_spec.pad_piece.as_bytes());
        model.bytes(2, &trainer.0);
        let mut normalizer = Writer::default();
        normalizer.bytes(1, self.normalizer_spec.name.as_bytes());
        normalizer.bytes(2, &self.normalizer_spec.precompiled_charsmap);
        normalizer.varint(3, self.normalizer_spec.add_dummy_prefix.into());
        normalizer.varint(4, self.normalizer_spec.remove_extra_whitespaces.into());
        normalizer.varint(5, self.normalizer_spec.escape_whitespaces.into());
        model.bytes(3, &normalizer.0);
        model.0
    }
}

/// `ModelProto.SentencePiece.Type` of a kind.
fn type_of(kind: PieceKind) -> u64 {
    match kind {
        PieceKind::Normal => 1,
        PieceKind::Unknown => 2,
        PieceKind::Control => 3,
        PieceKind::UserDefined => 4,
        PieceKind::Unused => 5,
        PieceKind::Byte(_) => 6,
    }
}

fn read_model(bytes: &[u8]) -> Result<ModelProto, Problem> {
    let mut model = ModelProto::default();
    let mut model_type = None;
    let mut fields = Fields(bytes);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => {
                let index = model.pieces.len();
                let piece = value.bytes("piece").and_then(read_piece);
                model.pieces.push(piece.map_err(|problem| problem.inside(&format!("pieces[{index}]")))?);
            }
            2 => value
                .bytes("message")
                .and_then(|bytes| read_trainer_spec(bytes, &mut model.trainer_spec, &mut model_type))
                .map_err(|problem| problem.inside("trainer_spec"))?,
            3 => value
                .bytes("message")
                .and_then(|bytes| read_normalizer_spec(bytes, &mut model.normalizer_spec))
                .map_err(|problem| problem.inside("normalizer_spec"))?,
            5 => value
                .bytes("message")
                .and_then(refuse_denormalizer)
                .map_err(|problem| problem.inside("denormalizer_spec"))?,
            _ => {}
        }
    }
    match model_type {
        Some(MODEL_TYPE_BPE) => Ok(model),
        other => Err(Problem::new("trainer_spec.model_type", model_type_name(other), "bpe (2)")),
    }
}

fn model_type_name(model_type: Option<u64>) -> String {
    match model_type {
        None => "unigram (the default)".to_owned(),
        Some(1) => "unigram (1)".to_owned(),
        Some(3) => "word (3)".to_owned(),
        Some(4) => "char (4)".to_owned(),
        Some(other) => other.to_string(),
    }
}

fn read_piece(bytes: &[u8]) -> Result<Piece, Problem> {
    let mut piece = String::new();
    let mut score = 0.0;
    let mut piece_type = 1;
    let mut fields = Fields(bytes);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => piece = value.string("piece")?,
            2 => score = value.float("score")?,
            3 => piece_type = value.varint("type")?,
            _ => {}
        }
    }
    let kind = match piece_type {
        1 => PieceKind::Normal,
        2 => PieceKind::Unknown,
        3 => PieceKind::Control,
        4 => PieceKind::UserDefined,
        5 => PieceKind::Unused,
        6 => match byte_of(&piece) {
            Some(byte) => PieceKind::Byte(byte),
            None => return Err(Problem::new("piece", format!("byte piece {piece:?}"), "<0x00> to <0xFF>")),
        },
        other => return Err(Problem::new("type", other.to_string(), "1 to 6")),
    };
    Ok(Piece { piece, score, kind })
}

/// The byte that a byte piece's name spells: `<0x0A>`, in capitals.
pub(crate) fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let byte = u8::from_str_radix(digits, 16).ok()?;
    (format!("{byte:02X}") == digits).then_some(byte)
}

fn read_trainer_spec(bytes: &[u8], spec: &mut TrainerSpec, model_type: &mut Option<u64>) -> Result<(), Problem> {
    let mut fields = Fields(bytes);
    while let Some((number, value)) = fields.next()? {
        match number {
            3 => *model_type = Some(value.varint("model_type")?),
            24 => spec.treat_whitespace_as_suffix = value.bool("treat_whitespace_as_suffix")?,
            35 => spec.byte_fallback = value.bool("byte_fallback")?,
            44 => spec.unk_surface = value.string("unk_surface")?,
            46 => spec.bos_piece = value.string("bos_piece")?,
            47 => spec.eos_piece = value.string("eos_piece")?,
            48 => spec.pad_piece = value.string("pad_piece")?,
            _ => {}
        }
    }
    Ok(())
}

fn read_normalizer_spec(bytes: &[u8], spec: &mut NormalizerSpec) -> Result<(), Problem> {
    let mut fields = Fields(bytes);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => spec.name = value.string("name")?,
            2 => spec.precompiled_charsmap = value.bytes("precompiled_charsmap")?.to_vec(),
            3 => spec.add_dummy_prefix = value.bool("add_dummy_prefix")?,
            4 => spec.remove_extra_whitespaces = value.bool("remove_extra_whitespaces")?,
            5 => spec.escape_whitespaces = value.bool("escape_whitespaces")?,
            _ => {}
        }
    }
    Ok(())
}

/// A denormaliser rewrites the whole decoded text, which a stream of tokens cannot do; no known checkpoint has one.
fn refuse_denormalizer(bytes: &[u8]) -> Result<(), Problem> {
    let mut spec = NormalizerSpec::default();
    read_normalizer_spec(bytes, &mut spec)?;
    if spec.precompiled_charsmap.is_empty() {
        return Ok(());
    }
    let found = format!("{} bytes of rules", spec.precompiled_charsmap.len());
    Err(Problem::new("precompiled_charsmap", found, "none"))
}

/// A field's value, by its wire type.
enum Value<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32(u32),
}

impl<'a> Value<'a> {
    fn wrong_type(&self, field: &str, allowed: &str) -> Problem {
        let found = match self {
            Value::Varint(_) => "a varint",
            Value::Fixed64 => "eight bytes",
            Value::Bytes(_) => "a length-delimited value",
            Value::Fixed32(_) => "four bytes",
        };
        Problem::new(field, found.to_owned(), allowed)
    }

    fn varint(&self, field: &str) -> Result<u64, Problem> {
        match self {
            Value::Varint(value) => Ok(*value),
            _ => Err(self.wrong_type(field, "a varint")),
        }
    }

    fn bool(&self, field: &str) -> Result<bool, Problem> {
        Ok(self.varint(field)? != 0)
    }

    fn float(&self, field: &str) -> Result<f32, Problem> {
        match self {
            Value::Fixed32(bits) => Ok(f32::from_bits(*bits)),
            _ => Err(self.wrong_type(field, "four bytes")),
        }
    }

    fn bytes(&self, field: &str) -> Result<&'a [u8], Problem> {
        match self {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(self.wrong_type(field, "a length-delimited value")),
        }
    }

    fn string(&self, field: &str) -> Result<String, Problem> {
        match str::from_utf8(self.bytes(field)?) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(Problem::new(field, error.to_string(), "UTF-8")),
        }
    }
}

/// The fields of one message that are still to be read.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// The next field's number and value, or none at the end of the message.
    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, Problem> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Fixed64
            }
            2 => {
                let len = self.varint()?;
                Value::Bytes(self.take(len)?)
            }
            5 => {
                let mut bits = [0; 4];
                bits.copy_from_slice(self.take(4)?);
                Value::Fixed32(u32::from_le_bytes(bits))
            }
            other => return Err(Problem::new("wire type", other.to_string(), "0, 1, 2 or 5")),
        };
        Ok(Some((tag >> 3, value)))
    }

    fn varint(&mut self) -> Result<u64, Problem> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Problem::new("varint", "more than ten bytes".to_owned(), "at most ten bytes"))
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], Problem> {
        let taken = usize::try_from(len).ok().and_then(|len| self.0.split_at_checked(len));
        let Some((taken, rest)) = taken else {
            return Err(Problem::new("length", len.to_string(), &format!("at most the {} bytes left", self.0.len())));
        };
        self.0 = rest;
        Ok(taken)
    }
}

/// A message being written.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, number: u64, value: u64) {
        self.raw_varint(number << 3);
        self.raw_varint(value);
    }

    fn fixed32(&mut self, number: u64, bits: u32) {
        self.raw_varint(number << 3 | 5);
        self.0.extend_from_slice(&bits.to_le_bytes());
    }

    fn bytes(&mut self, number: u64, bytes: &[u8]) {
        self.raw_varint(number << 3 | 2);
        self.raw_varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }
}
