use super::*;
use crate::quant::PackedMatrix;
use crate::testing::Numbers;

const FORMATS: [PackedFormat; 2] = [PackedFormat::W8A8, PackedFormat::W4A8];

/// Numbers of a normal distribution with deviation one (Box and Muller).
fn gaussian(seed: u64, len: usize) -> Vec<f32> {
    let uniform = Numbers::new(seed).vec(2 * len);
    let pairs = uniform.as_chunks::<2>().0;
    let radius = |u: f32| (-2.0 * (0.5 * u + 0.5).max(1e-7).ln()).sqrt();
    pairs.iter().map(|&[u, v]| radius(u) * (std::f32::consts::PI * v).cos()).collect()
}

/// The weights after packing, and the error that packing reports. Starts from bytes that nothing may rely on.
fn pack_and_unpack(isa: Isa, format: PackedFormat, rows: &[f32], cols: usize) -> (Vec<f32>, PackError) {
    let mut bytes = vec![0xa5; format.panel_bytes(cols)];
    let error = pack_panel(isa, format, rows, cols, &mut bytes);
    (unpack(&bytes, format, rows.len() / cols, cols), error)
}

fn unpack(bytes: &[u8], format: PackedFormat, num_rows: usize, cols: usize) -> Vec<f32> {
    let matrix = PackedMatrix::new(bytes, format, num_rows, cols);
    let mut unpacked = vec![0.0; num_rows * cols];
    for (row, out) in unpacked.chunks_exact_mut(cols).enumerate() {
        matrix.dequantize_row(row, out);
    }
    unpacked
}

/// Weights that share a scale.
fn scale_len(format: PackedFormat, cols: usize) -> usize {
    match format {
        PackedFormat::W8A8 => cols,
        PackedFormat::W4A8 => BLOCK_LEN,
    }
}

fn largest(weights: &[f32]) -> f32 {
    weights.iter().fold(0.0, |largest: f32, w| largest.max(w.abs()))
}

fn squared_error(weights: &[f32], packed: &[f32]) -> f64 {
    weights.iter().zip(packed).map(|(w, p)| (f64::from(*w) - f64::from(*p)).powi(2)).sum()
}

/// Weights of many kinds: `(rows, cols)` of each.
fn cases() -> Vec<(usize, usize, Vec<f32>)> {
    let mut cases = Vec::new();
    for (num_rows, cols) in [(1, 32), (17, 64), (32, 160), (5, 1344)] {
        let numbers = gaussian(cols as u64, num_rows * cols);
        cases.push((num_rows, cols, numbers.iter().map(|x| x * 0.02).collect()));
        cases.push((num_rows, cols, Numbers::new(3).vec(num_rows * cols)));
        // Outliers, rare numbers among zeros, and one number for all.
        cases.push((num_rows, cols, numbers.iter().map(|x| x.powi(5)).collect()));
        cases.push((num_rows, cols, numbers.iter().map(|&x| if x > 2.0 { x } else { 0.0 }).collect()));
        cases.push((num_rows, cols, vec![-0.7; num_rows * cols]));
    }
    cases
}

#[test]
fn no_weight_moves_by_more_than_the_bound_of_its_format() {
    for (num_rows, cols, weights) in cases() {
        for (isa, format) in Isa::available().flat_map(|isa| FORMATS.map(|format| (isa, format))) {
            let (packed, error) = pack_and_unpack(isa, format, &weights, cols);
            // W8A8 gives up at most a tenth of the range; W4A8 two levels of nine, which least squares may stretch.
            let bound = match format {
                PackedFormat::W8A8 => 0.1001,
                PackedFormat::W4A8 => 0.25,
            };
            let len = scale_len(format, cols);
            for (weights, packed) in weights.chunks(len).zip(packed.chunks(len)) {
                for (w, p) in weights.iter().zip(packed) {
                    assert!((w - p).abs() <= bound * largest(weights), "{format:?} {num_rows} x {cols}: {p} for {w}");
                }
            }
            let expected = squared_error(&weights, &packed);
            assert!((error.squared_error - expected).abs() <= 1e-4 * expected + 1e-9, "{error:?}, {expected}");
            let max_error = weights.iter().zip(&packed).fold(0.0, |max: f32, (w, p)| max.max((w - p).abs()));
            assert!((error.max_error - max_error).abs() <= 1e-5 * largest(&weights), "{error:?}, {max_error}");
        }
    }
}

#[test]
fn gaussian_weights_lose_less_than_the_stated_part() {
    let cols = 5120;
    let weights = gaussian(7, 32 * cols);
    for isa in Isa::available() {
        for (format, bound) in [(PackedFormat::W8A8, 0.009), (PackedFormat::W4A8, 0.0815)] {
            let (_, error) = pack_and_unpack(isa, format, &weights, cols);
            assert!(error.relative() < bound, "{format:?}: {}", error.relative());
        }
    }
}

/// What plain rounding gives: the largest weight at the last level on both sides.
fn plain(weights: &[f32], max_level: f32) -> Vec<f32> {
    let scale = largest(weights) / max_level;
    weights.iter().map(|w| (w / scale).round_ties_even() * scale).collect()
}

#[test]
fn rounding_is_never_worse_than_plain_rounding_to_the_largest_weight() {
    for (_, cols, weights) in cases() {
        for (format, max_level) in [(PackedFormat::W8A8, 127.0), (PackedFormat::W4A8, 7.0)] {
            let (packed, _) = pack_and_unpack(Isa::best(), format, &weights, cols);
            let len = scale_len(format, cols);
            for (weights, packed) in weights.chunks(len).zip(packed.chunks(len)) {
                if largest(weights) > 0.0 {
                    let (ours, theirs) =
                        (squared_error(weights, packed), squared_error(weights, &plain(weights, max_level)));
                    // A scale in f16 is off by up to 2^-11, which adds up to its square of the squared sum.
                    let rounding = 2f64.powi(-22) * squared_error(weights, &vec![0.0; len]);
                    assert!(ours <= theirs * 1.001 + rounding, "{format:?}: {ours} instead of {theirs}");
                }
            }
        }
    }
}

#[test]
fn weights_that_are_levels_already_come_back_as_they_are() {
    for isa in Isa::available() {
        // The largest level must be there: it is what the scale is found by.
        let bytes: Vec<f32> = (0..3 * 96).map(|i| 0.25 * (127 - (i % 96 * 37) % 255) as f32).collect();
        assert_eq!(pack_and_unpack(isa, PackedFormat::W8A8, &bytes, 96).0, bytes);
        let nibbles: Vec<f32> = (0..3 * 96).map(|i| 0.125 * ((i * 7) % 16 - 8) as f32).collect();
        assert_eq!(pack_and_unpack(isa, PackedFormat::W4A8, &nibbles, 96).0, nibbles);
    }
}

#[test]
fn bytes_lie_as_the_layout_says() {
    let (row, col, cols) = (21, 57, 96);
    let mut weights = vec![0.0; 32 * cols];
    weights[row * cols + col] = -4.0;
    let mut nibbles = vec![0; PackedFormat::W4A8.panel_bytes(cols)];
    pack_panel(Isa::best(), PackedFormat::W4A8, &weights, cols, &mut nibbles);
    // Block 1, second half, column 25 = 16 + 4 * 2 + 1: a high nibble in the run j = 2.
    let place = 576 + 64 + 256 + 2 * 64 + (row - 16) * 4 + 1;
    let scale = f16::from_le_bytes([nibbles[576 + 2 * row], nibbles[576 + 2 * row + 1]]).to_f32();
    assert_eq!((f32::from(nibbles[place] >> 4) - 8.0) * scale, -4.0);
    assert_eq!(nibbles[place] & 15, 8);
    let mut bytes = vec![0; PackedFormat::W8A8.panel_bytes(cols)];
    pack_panel(Isa::best(), PackedFormat::W8A8, &weights, cols, &mut bytes);
    let place = 1024 + 512 + 6 * 64 + (row - 16) * 4 + 1;
    let scale = f32::from_le_bytes(std::array::from_fn(|i| bytes[3 * 1024 + 4 * row + i]));
    assert_eq!((f32::from(bytes[place]) - 128.0) * scale, -4.0);
    assert_eq!(bytes.iter().filter(|&&byte| byte != 128 && byte != 0).count(), 1 + 4 - zeros(scale));
}

fn zeros(scale: f32) -> usize {
    scale.to_le_bytes().into_iter().filter(|&byte| byte == 0 || byte == 128).count()
}

#[test]
fn weights_that_are_no_numbers_are_counted_and_become_zero() {
    let cols = 64;
    let mut weights = gaussian(9, 19 * cols);
    let clean = weights.clone();
    for (place, bad) in [(0, f32::NAN), (18 * cols + 63, f32::INFINITY), (5 * cols + 40, f32::NEG_INFINITY)] {
        weights[place] = bad;
    }
    for (isa, format) in Isa::available().flat_map(|isa| FORMATS.map(|format| (isa, format))) {
        let (packed, error) = pack_and_unpack(isa, format, &weights, cols);
        assert_eq!(error.num_non_finite, 3);
        assert!(error.squared_error.is_finite() && error.relative() < 0.1);
        assert!(packed.iter().zip(&clean).all(|(p, w)| (p - w).abs() < 4.0));
        assert_eq!((packed[0], packed[18 * cols + 63], packed[5 * cols + 40]), (0.0, 0.0, 0.0));
    }
}

#[test]
fn missing_rows_and_zero_weights_become_zero() {
    for format in FORMATS {
        let cols = 96;
        let mut bytes = vec![0xa5; format.panel_bytes(cols)];
        let error = pack_panel(Isa::best(), format, &[0.0; 3 * 96], cols, &mut bytes);
        assert_eq!((error, error.relative()), (PackError::default(), 0.0));
        assert!(unpack(&bytes, format, PANEL_ROWS, cols).iter().all(|&w| w == 0.0));
    }
}

#[test]
fn extreme_weights_neither_panic_nor_become_other_than_finite() {
    for magnitude in [1e-45, 1e-39, 1e-20, 1e20, f32::MAX] {
        for (isa, format) in Isa::available().flat_map(|isa| FORMATS.map(|format| (isa, format))) {
            let weights: Vec<f32> = Numbers::new(4).vec(7 * 32).iter().map(|x| x * magnitude).collect();
            let (packed, error) = pack_and_unpack(isa, format, &weights, 32);
            assert!(packed.iter().all(|w| w.is_finite()) && error.num_non_finite == 0, "{format:?} {magnitude}");
        }
    }
}

#[test]
fn given_levels_are_kept_with_their_scales() {
    // 70 is not a multiple of 32: the last block has columns that are filled up.
    let (num_rows, cols) = (19, 70);
    let levels: Vec<i8> = (0..num_rows * cols).map(|i| (i * 89 % 256) as u8 as i8).collect();
    let scales: Vec<f32> = (0..num_rows).map(|row| 0.01 * (row + 1) as f32).collect();
    let mut bytes = vec![0xa5; PackedFormat::W8A8.panel_bytes(cols)];
    pack_int8(&levels, &scales, cols, &mut bytes);
    let unpacked = unpack(&bytes, PackedFormat::W8A8, num_rows, cols);
    for (i, w) in unpacked.iter().enumerate() {
        assert_eq!(*w, scales[i / cols] * f32::from(levels[i]));
    }
}
